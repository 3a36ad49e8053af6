"""Recommenders and everything that ranks."""

import os

# OpenMP threads that spin for long while they wait make a step 25 times slower as soon as another process wants the
# core. Read when torch is loaded, so it is set before anything of this package can load it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
