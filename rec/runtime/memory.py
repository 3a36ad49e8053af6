"""Let glibc keep freed memory instead of handing it back and faulting it in again."""

import ctypes
import logging
import sys
from pathlib import Path

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Serve large tensors from the heap, and never trim it.

    By default every tensor over 32 MiB is a fresh mapping, whose pages cost more than the arithmetic on them: on
    virtual machines a CPU training step is 1.1 to 1.3 times faster this way. Does nothing where there is no glibc,
    nor on a machine with a GPU: there large tensors live elsewhere, and copies of them should not stay.
    """
    if not sys.platform.startswith("linux") or Path("/dev/nvidiactl").exists():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 64 * 2**20)
