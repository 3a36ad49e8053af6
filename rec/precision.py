"""The precision that models are computed in."""

import functools
import logging
from typing import Literal

import torch

log = logging.getLogger(__name__)

Precision = Literal["auto", "fp32", "bf16"]
"""bf16: autocast, weights and optimizer stay float32. auto: that, where the device multiplies bfloat16, else fp32."""


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this process's device, its GPU if there is one, has instructions for bfloat16.

    A CPU without them (AVX2 alone) is some fifty times slower in bfloat16 than in float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def is_bf16(precision: str) -> bool:
    """What a recipe's ``precision`` means on this process's device."""
    if precision == "bf16":
        _warn_if_emulated()
    return precision == "bf16" or (precision == "auto" and multiplies_bf16())


def dtype_of(precision: str) -> torch.dtype:
    """Of the matrix products."""
    return torch.bfloat16 if is_bf16(precision) else torch.float32


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """``precision``, as a context."""
    return torch.autocast(device.type, torch.bfloat16, enabled=is_bf16(precision))


@functools.cache
def _warn_if_emulated() -> None:
    if not multiplies_bf16():
        log.warning("precision bf16 is emulated on this device and very slow: auto and fp32 are float32 here")
