"""Let glibc keep freed memory instead of handing it back and faulting it in again, and in huge pages."""

import ctypes
import logging
import os
import resource
import sys
from pathlib import Path

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
MADV_HUGEPAGE = 14
STRICT_OVERCOMMIT = "2"


def keep_freed_memory() -> None:
    """Serve large tensors from the heap, never trim it, and ask for huge pages.

    By default every tensor over 32 MiB is a fresh mapping of small pages. To fault them in costs more than the
    arithmetic on them, and to look them up as much again on a virtual machine whose memory has been in use for a
    while. Does nothing where there is no glibc, nor on a machine with a GPU: there large tensors live elsewhere, and
    copies of them should not stay.
    """
    if not sys.platform.startswith("linux") or Path("/dev/nvidiactl").exists():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_TOP_PAD, 64 * 2**20)
        _ask_for_huge_pages(libc)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """Advise the heap's next addresses, half as many as the machine has memory.

    Allocated and freed untouched, they cost no memory, and as the heap is never trimmed, malloc hands them out from
    then on. ``GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` does it too, but has to be there before the process starts.
    Where address space is counted, none is taken.
    """
    overcommit = Path("/proc/sys/vm/overcommit_memory")
    counted = not overcommit.exists() or overcommit.read_text().strip() == STRICT_OVERCOMMIT
    if counted or resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        return
    page = os.sysconf("SC_PAGE_SIZE")
    size = page * os.sysconf("SC_PHYS_PAGES") // 2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if block := libc.malloc(size):
        begin = block + -block % page
        if libc.madvise(begin, (size - (begin - block)) // page * page, MADV_HUGEPAGE):
            log.debug("no huge pages: %s", os.strerror(ctypes.get_errno()))
        libc.free(block)
