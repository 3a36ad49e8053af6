"""Dying with whoever started a process, so that no orphan ever writes to a run folder."""

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
# Looked up now: between fork and exec, where die_with_parent runs too, the loader may be locked.
PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform.startswith("linux") else None
PARENT = "RECALIGN_PARENT"


def die_with_parent() -> None:
    """Get SIGKILL when the parent process dies, however it dies (Linux)."""
    if PRCTL is not None:
        PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with_parent_if_asked() -> None:
    """The same if whoever started this process, or its launcher, set ``PARENT`` to its own process number."""
    asked = os.environ.get(PARENT)
    if asked is None:
        return
    die_with_parent()
    # Python took seconds to get here. Who died meanwhile tells nobody any more.
    if PRCTL is not None and int(asked) not in _ancestors():
        sys.exit(f"process {asked}, which started this one, is gone")


def _ancestors() -> set[int]:
    """Numbers of the parent, its parent, and so on."""
    found, process = set(), os.getppid()
    while process > 0:
        found.add(process)
        try:
            # "number (name) state parent ...", and a name may hold anything.
            after_name = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
        except OSError:  # it has ended meanwhile
            break
        process = int(after_name.split()[1])
    return found
