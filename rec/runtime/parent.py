"""Dying with whoever started a process, so that no orphan ever writes to a run folder."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
# Looked up now: between fork and exec, where die_with_parent runs too, the loader may be locked.
PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform.startswith("linux") else None
PARENT = "RECALIGN_PARENT"


def die_with_parent() -> None:
    """Get SIGKILL when the parent process dies, however it dies (Linux)."""
    if PRCTL is not None:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_parent_if_asked() -> None:
    """The same if whoever started this process set ``PARENT`` in its environment."""
    if PARENT in os.environ:
        die_with_parent()
