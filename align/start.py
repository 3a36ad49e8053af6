"""How both jobs start: their one argument, and dying with whoever started them."""

import argparse
import ctypes
import os
import signal
import sys
from pathlib import Path

from align.config import MainJob, load_job

PR_SET_PDEATHSIG = 1
# Looked up now: between fork and exec, where die_with_parent runs too, the loader may be locked.
PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform.startswith("linux") else None
PARENT = "RECALIGN_PARENT"


def read_arguments(
    description: str, replay: bool = False, generator: bool = False
) -> tuple[MainJob, argparse.Namespace]:
    """Parse ``--config recipe.yaml key=value …`` and tie this process to its parent if that asked for it.

    ``replay`` adds ``--replay-into``, which is None where it is not given, ``generator`` adds ``--number``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a recipe, or the config.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. align.trainer.lr=1e-5")
    if replay:
        parser.add_argument(
            "--replay-into",
            type=Path,
            metavar="DIR",
            help="train again on the run's sample log, writing to this folder",
        )
    if generator:
        parser.add_argument("--number", type=int, default=0, help="which of the generators this is, from 0")
    arguments = parser.parse_args()
    if PARENT in os.environ:
        die_with_parent()
    return load_job(arguments.config, arguments.overrides), arguments


def generator_role(number: int) -> str:
    """The name of one of a run's generators, for locks and logs."""
    return f"generator-{number}" if number else "generator"


def die_with_parent() -> None:
    """Get SIGKILL when the parent process dies, however it dies (Linux): no orphan ever writes to a run folder."""
    if PRCTL is not None:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)
