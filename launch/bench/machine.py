"""What a measurement was taken on: speeds are compared with those of the same machine alone."""

import contextlib
import platform
from pathlib import Path

import torch

BF16 = {"avx512_bf16", "amx_bf16"}


def machine() -> str:
    """The GPU, or where there is none the processor and how many threads torch has of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """This machine's CPU and its instructions for bfloat16."""
    told = dict.fromkeys(("model name", "flags"), "")
    with contextlib.suppress(OSError):  # no Linux
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            told[name.strip()] = value.strip()
    return ", ".join([told["model name"] or platform.processor(), *sorted(BF16 & set(told["flags"].split()))])
