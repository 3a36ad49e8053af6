"""Huge pages for large tensors, asked for by a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PROCESS = """
import resource, sys
from rec.runtime.memory import keep_freed_memory
if sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_AS, (2**36, 2**36))
def sizes(path, keys):
    lines = (line.split() for line in open(path))
    return sum(int(words[1]) for words in lines if words[0] in keys) // 1024
before = sizes("/proc/self/status", ["VmRSS:"]), sizes("/proc/self/status", ["VmSize:"])
keep_freed_memory()
print(sizes("/proc/self/status", ["VmRSS:"]) - before[0], sizes("/proc/self/status", ["VmSize:"]) - before[1])
import torch
held = torch.ones(64 * 2**20)
print(sizes("/proc/self/smaps", ["AnonHugePages:"]))
"""


def measured(*arguments: str) -> tuple[int, int, int]:
    """MiB: resident and address space that the call took, then what of 256 MiB is in huge pages."""
    command = [sys.executable, "-c", PROCESS, *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    resident, addresses, huge = map(int, done.stdout.split())
    return resident, addresses, huge


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="large tensors live on the GPU")
@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this machine gives no huge pages"
)
def test_large_tensors_are_in_huge_pages_which_cost_no_memory_before():
    resident, _, huge = measured()
    assert resident < 16
    assert huge > 128


def test_no_address_space_is_taken_where_it_is_limited():
    _, addresses, _ = measured("limited")
    assert addresses < 256
