"""How much of a device's arithmetic a training step uses (MFU)."""

import math
import re

import torch
from transformers import PretrainedConfig

# Dense bfloat16 FLOP/s (V100: float16) that the vendor states, by words of the device's name; the first that fits.
PEAK_FLOPS = (
    ({"H100", "PCIe"}, 756e12),
    ({"H100", "NVL"}, 835e12),
    ({"H100"}, 989e12),
    ({"H200"}, 989e12),
    ({"GH200"}, 989e12),
    ({"B200"}, 2250e12),
    ({"A100"}, 312e12),
    ({"L40S"}, 362e12),
    ({"A10G"}, 70e12),
    ({"A10"}, 125e12),
    ({"V100"}, 125e12),
)


def flops_per_token(config: PretrainedConfig, parameters: int, length: int, output: bool = True) -> float:
    """Of a training step: 6 N + 12 L d T, attention counted as if it saw the whole row, as nanoGPT and others count it.

    Args:
        config: of a causal LM.
        parameters: all of them; what is looked up alone, learned positions and an untied table of inputs, is taken
            away.
        length: T, tokens in a document's row.
        output: whether the next token is predicted; its table of vectors is the tied input's.
    """
    width = config.hidden_size
    used = parameters - getattr(config, "n_positions", 0) * width
    tables = (0 if config.tie_word_embeddings else 1) + (0 if output else 1)
    used -= tables * config.vocab_size * width
    return 6 * used + 12 * config.num_hidden_layers * width * length


def peak_flops(device: torch.device) -> float:
    """Stated bfloat16 FLOP/s of ``device``; infinite where they are not known, so that the MFU is 0 and not wrong."""
    if device.type != "cuda":
        return math.inf
    return stated_flops(torch.cuda.get_device_name(device))


def stated_flops(name: str) -> float:
    """Of a device by its name; infinite if it is not known."""
    words = set(re.split(r"[\s-]+", name))
    return next((peak for known, peak in PEAK_FLOPS if known <= words), math.inf)
