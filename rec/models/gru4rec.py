"""GRU4Rec (Hidasi et al. 2016): a recurrent network over the item sequence.

The paper runs through parallel sessions and carries hidden states from batch to batch; here whole windows are read
from a zero state, and losses are those of ``rec.loss`` at every place. A dense layer maps the hidden state to the
width of the item vectors, which score it (tied, as the authors' later "constrained embedding").
"""

import math
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from rec.dropout import dropout
from rec.item_encoder import ItemEncoder
from rec.models.base import SequenceRecommender
from rec.runtime.config import Section


class GRU4RecConfig(Section):
    """Size of a GRU4Rec."""

    name: Literal["GRU4Rec"] = "GRU4Rec"
    dim: int = Field(64, ge=1)
    """Width D of item vectors and states."""
    hidden: int = Field(128, ge=1)
    """Width of the GRU's own state."""
    layers: int = Field(1, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    """On the input vectors, and between layers."""
    max_length: int = Field(100, ge=1)
    """Longest history that is read, in items; earlier ones are cut off."""


class GRU4Rec(SequenceRecommender):
    """Recurrent recommendation. Right padding needs no mask: no state ever sees what comes after it."""

    architecture = "GRU4Rec"
    config_class = GRU4RecConfig
    samples = "next-item"

    def __init__(self, config: GRU4RecConfig, items: ItemEncoder) -> None:
        super().__init__(config, items)
        between = config.dropout if config.layers > 1 else 0.0
        self.gru = nn.GRU(config.dim, config.hidden, config.layers, batch_first=True, dropout=between)
        self.out = nn.Linear(config.hidden, config.dim)

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        self.check_length(items)
        # Item vectors are of a size that suits scoring; unscaled they would hardly move the gates.
        x = self.items(items, knowledge) * math.sqrt(self.config.dim)  # [B, L, D]
        hidden, _ = self.gru(dropout(x, self.config.dropout, self.training))  # [B, L, hidden]
        return self.out(hidden)
