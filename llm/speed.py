"""How much of a device's arithmetic a training step uses (MFU)."""

import math

import torch
from transformers import PretrainedConfig

# Dense bfloat16 FLOP/s that the vendor states.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "A10": 125e12,
    "V100": 125e12,
}


def flops_per_token(config: PretrainedConfig, parameters: int, length: int, output: bool = True) -> float:
    """Of a training step: 6 N + 12 L d T, attention counted as if it saw the whole row, as nanoGPT and others count it.

    Args:
        config: of a causal LM.
        parameters: all of them; learned positions, which are looked up alone, are taken away.
        length: T, tokens in a row.
        output: whether the next token is predicted; its table of vectors is the tied input's.
    """
    width = config.hidden_size
    used = parameters - getattr(config, "n_positions", 0) * width
    if not output:
        used -= config.vocab_size * width
    return 6 * used + 12 * config.num_hidden_layers * width * length


def peak_flops(device: torch.device) -> float:
    """Stated bfloat16 FLOP/s of ``device``; infinite where they are not known, so that the MFU is 0 and not wrong."""
    if device.type != "cuda":
        return math.inf
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), math.inf)
