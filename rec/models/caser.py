"""Caser (Tang & Wang 2018): convolutions over the last few items, taken as an image of ``window`` x D.

State l reads E [W, D], the vectors of items l-W+1 to l, zero where a history is shorter (Eq. 1). Vectors of N(0, 0.02)
are scaled by sqrt(D), as in SASRec: the convolutions then see values of the size that their initialisation expects.

    c_i   = relu(F^h · E[i : i+h] + b)        for each of n_h filters F^h [h, D] of every height h = 1..W    (Eq. 3)
    o     = max_i c_i                         [n_h W]                                                    (Eq. 4, 5)
    õ_k   = Σ_a F̃_k[a] E[a] + b_k             for each of n_v filters F̃ [W], all together [n_v D]        (Eq. 7, 8)
    z     = relu(W [o ; õ] + b)               [D], dropout on [o ; õ]                                       (Eq. 9)
    state = W' z + b'

No state looks ahead and neighbouring windows share their convolutions, so one pass trains every position: c holds one
value of a filter for each place of the sequence, and the maximum over a window is a sliding maximum.

The paper scores W'_i · [z ; P_u] + b'_i with a table W' of its own and a vector P_u for each user. Here the table is
the item encoder's, behind one linear map, as everywhere in this package, and there is no P_u: users who were not
trained on get scores too. RecBole's Caser ties the table as well, but ends in a second ReLU; states without negative
entries fit a table around zero badly (Amazon Beauty, 8 epochs: validation NDCG@10 .029 against .037).
"""

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rec.dropout import dropout
from rec.item_encoder import ItemEncoder
from rec.models.base import SequenceRecommender
from rec.runtime.config import Section


class CaserConfig(Section):
    """Size of a Caser."""

    name: Literal["Caser"] = "Caser"
    dim: int = Field(64, ge=1)
    """Width D of item vectors and states."""
    window: int = Field(5, ge=1)
    """Items W that a state reads, and the greatest height of a horizontal filter."""
    n_h: int = Field(16, ge=1)
    """Horizontal filters of each height."""
    n_v: int = Field(4, ge=1)
    """Vertical filters."""
    dropout: float = Field(0.5, ge=0, lt=1)
    max_length: int = Field(100, ge=1)
    """Longest history that is taken in, in items; its last state still reads ``window`` of them."""

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if self.window > self.max_length:
            raise ValueError(f"window {self.window} is longer than max_length {self.max_length}")
        return self


class Caser(SequenceRecommender):
    """Convolutional sequence embedding."""

    architecture = "Caser"
    config_class = CaserConfig
    samples = "next-item"

    def __init__(self, config: CaserConfig, items: ItemEncoder) -> None:
        super().__init__(config, items)
        heights = range(1, config.window + 1)
        # These hold and initialise the filters; ``forward`` takes their weights.
        self.horizontal = nn.ModuleList(nn.Conv1d(config.dim, config.n_h, height) for height in heights)
        self.vertical = nn.Conv1d(1, config.n_v, config.window)
        self.dense = nn.Linear(config.n_h * config.window + config.n_v * config.dim, config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        for linear in (self.dense, self.out):
            # As in RecBole's Caser. After N(0, 0.02) the states would start near zero: no norm lifts them up again.
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    @property
    def reach(self) -> int:
        return self.config.window

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        self.check_length(items)
        # Some item encoders give padding a vector; before and after a history there must be none.
        vectors = self.items(items, knowledge) * (items > 0)[..., None] * math.sqrt(self.config.dim)
        rows = min(self.config.window, items.shape[1])  # of each E; all above them are zero
        images = F.pad(vectors, (0, 0, rows - 1, 0)).unfold(1, rows, 1).contiguous()  # [B, L, D, rows]
        features = torch.cat([*self._horizontal(images), self._vertical(images)], dim=-1)  # [B, L, n_h W + n_v D]
        features = dropout(features, self.config.dropout, self.training)
        return self.out(F.relu(self.dense(features)))

    def last_states(self, items: Tensor, lengths: Tensor, knowledge: Tensor | None = None) -> Tensor:
        self.check_length(items)
        # Of each history the last window alone.
        rows = min(self.config.window, items.shape[1])
        kept = lengths.clamp(max=rows)
        places = (lengths - kept)[:, None] + torch.arange(rows, device=items.device)
        if knowledge is not None:
            knowledge = knowledge.gather(1, places[..., None].expand(-1, -1, knowledge.shape[-1]))
        return super().last_states(items.gather(1, places), kept, knowledge)

    def _horizontal(self, images: Tensor) -> list[Tensor]:
        """o for each height, [B, L, n_h].

        All heights are one matrix product, with filters [n_h, D, h] filled up with zeros above: at the price of twice
        the multiplications it takes a small part of the time of one convolution for each.
        """
        window, count, rows = self.config.window, self.config.n_h, images.shape[-1]
        filters = [F.pad(part.weight, (window - height, 0)) for height, part in enumerate(self.horizontal, start=1)]
        bias = torch.cat([part.bias for part in self.horizontal])
        c = F.linear(images.flatten(2), torch.cat(filters)[..., -rows:].flatten(1), bias)
        # Before a history a filter sees nothing, and gives its bias.
        c = torch.cat([bias.expand(len(c), window - 1, -1), c], dim=1)
        c = F.relu(c).transpose(1, 2).contiguous()  # [B, W n_h, W - 1 + L]
        return [
            F.max_pool1d(own[..., height - 1 :], window - height + 1, stride=1).transpose(1, 2)
            for height, own in enumerate(c.split(count, dim=1), start=1)
        ]

    def _vertical(self, images: Tensor) -> Tensor:
        """õ [B, L, n_v D]: the same filters on every one of the D columns."""
        weight = self.vertical.weight[:, 0, -images.shape[-1] :]  # [n_v, rows]
        return F.linear(images, weight, self.vertical.bias).transpose(2, 3).flatten(2)
