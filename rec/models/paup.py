"""PAUP (Zhu et al. 2022): items attend to segments of the history, and positions carry the items along.

Layers as in ``rec/models/two_branch.py``; PAUP's own are

    K' = conv₂(relu(conv₁(K)))   [m, D]     convolutions with stride = width: k₁ items make a slot, k₂ slots a segment
    Z  = P + X                              unsymmetrical positions: items in Q_p and K_p, but no positions in V

with weights of their own for V', and D / 16 channels between them ("progressive" attention: no segment before its
slots). For M = max_length / k₁ slots, k₂ = ⌈M / m⌉ and ⌈(k₂ m - M) / 2⌉ empty slots stand before the first.
A convolution whose stride is its width is a linear map of each piece, and is written so; W_K of K = X W_K + b is part
of conv₁'s map, so that K is not made.

``attention: paper`` keeps padding out: the oldest item is always the first place of the first slot, places after the
last item hold zeros after the projection to K, slots without an item hold zeros after conv₁, and a segment without an
item gets no attention. Histories that fill all places see the same convolutions as under ``reference``.
"""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rec.models.two_branch import Layer, TwoBranch, TwoBranchConfig

REDUCTION = 16


class PAUPConfig(TwoBranchConfig):
    """Size of a PAUP."""

    name: Literal["PAUP"] = "PAUP"
    dim: int = Field(64, ge=REDUCTION)
    """Width D of item vectors and states."""
    segments: int = Field(4, ge=1)
    """Segments m that a history is summarised in."""
    slot: int = Field(10, ge=1)
    """Items k₁ in a slot; it must divide max_length."""

    @property
    def slots(self) -> int:
        """M."""
        return self.max_length // self.slot

    @property
    def slots_per_segment(self) -> int:
        """k₂."""
        return math.ceil(self.slots / self.segments)

    @property
    def slots_before(self) -> int:
        """Empty slots before the first, and as many after the last."""
        return math.ceil((self.slots_per_segment * self.segments - self.slots) / 2)

    @model_validator(mode="after")
    def _segments_come_out(self) -> Self:
        if self.max_length % self.slot:
            raise ValueError(
                f"max_length {self.max_length} is no multiple of slot {self.slot}: conv₁ would never read the newest"
                f" {self.max_length % self.slot} items of a long history"
            )
        if self.segments > self.slots:
            raise ValueError(
                f"max_length {self.max_length} in slots of {self.slot} items makes {self.slots} slots, too few for"
                f" {self.segments} segments"
            )
        return self


class DownConv(nn.Module):
    """Summarises keys or values of L items in m segments. Default initialisation, as in the reference."""

    def __init__(self, config: PAUPConfig) -> None:
        super().__init__()
        channels = config.dim // REDUCTION
        self.config = config
        self.conv1 = nn.Linear(config.slot * config.dim, channels)
        self.conv2 = nn.Linear(config.slots_per_segment * channels, config.dim)

    def forward(self, x: Tensor, projection: nn.Linear, inside: Tensor | None) -> Tensor:
        """[B, m, D] of the keys (or values) that ``projection`` makes of x [B, L, D]; ``inside`` [B, L] marks items."""
        config, length = self.config, x.shape[1]
        slots = math.ceil(length / config.slot)
        conv1 = self.conv1.weight.unflatten(1, (config.slot, -1))  # [D / 16, k₁, D]
        weight, bias = conv1 @ projection.weight, conv1 @ projection.bias  # of each place of a slot
        if inside is None:
            bias = bias.sum(1)
        else:
            added = slots * config.slot - length
            x = F.pad(x * inside[..., None], (0, 0, 0, added))
            # Only items have the projection's bias.
            bias = F.pad(inside, (0, added)).unflatten(1, (slots, config.slot)).to(bias.dtype) @ bias.T
        middle = F.linear(x.unflatten(1, (slots, config.slot)).flatten(2), weight.flatten(1), self.conv1.bias)
        middle = F.relu(middle + bias)  # [B, slots, D / 16]
        if inside is not None:
            middle = middle * inside[:, :: config.slot, None]  # a slot holds an item if its first place does
        after = config.segments * config.slots_per_segment - config.slots_before - slots
        middle = F.pad(middle, (0, 0, config.slots_before, after))
        return self.conv2(middle.unflatten(1, (config.segments, -1)).flatten(2))


class PAUPLayer(Layer):
    """Attention to segments."""

    def __init__(self, config: PAUPConfig) -> None:
        super().__init__(config)
        self.config = config
        self.down_keys, self.down_values = DownConv(config), DownConv(config)

    def summarise(self, x: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        exists = None if inside is None else self._segments_with_items(inside.sum(1))
        return self.down_keys(x, self.key, inside), self.down_values(x, self.value, inside), exists

    def position_input(self, x: Tensor, positions: Tensor) -> Tensor:
        return positions + x

    def _segments_with_items(self, lengths: Tensor) -> Tensor:
        """[B, m]: the first slot of the segment that is there at all holds an item."""
        config = self.config
        first = torch.arange(config.segments, device=lengths.device) * config.slots_per_segment - config.slots_before
        empty = first + config.slots_per_segment <= 0  # nothing but slots before the first
        return (first.clamp(min=0) * config.slot < lengths[:, None]) & ~empty


class PAUP(TwoBranch):
    """Progressive self-attention with unsymmetrical positional encoding."""

    architecture = "PAUP"
    config_class = PAUPConfig
    layer = PAUPLayer
