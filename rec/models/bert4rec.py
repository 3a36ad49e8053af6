"""BERT4Rec (Sun et al. 2019): a bidirectional Transformer that fills in masked items (the Cloze task).

A history is scored by appending the mask and reading its place. Training on randomly masked places alone never shows
the model that situation, context on the left only, so the paper adds windows whose last item alone is masked (3.6);
re-implementations that left these out fell far behind. Item vectors serve as input and output (Eq. 7); the item bias
b^O is left out, since losses score states against a table alone. The LayerNorm of the output head is the authors'
code's, the paper does not mention it.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rec.attention import HeadsSection, attention
from rec.dropout import dropout
from rec.item_encoder import ItemEncoder
from rec.linear_cross_entropy import ROW_MULTIPLE
from rec.models.base import SequenceRecommender


class BERT4RecConfig(HeadsSection):
    """Size of a BERT4Rec, and how its training windows are masked."""

    name: Literal["BERT4Rec"] = "BERT4Rec"
    dim: int = Field(64, ge=1)
    """Width D of item vectors and states; the feed-forward layers have 4 D."""
    blocks: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    dropout: float = Field(0.1, ge=0, lt=1)
    max_length: int = Field(100, ge=2)
    """Longest sequence that is read, in items; of a history one place less, which the mask takes."""
    mask_ratio: float = Field(0.2, gt=0, le=1)
    """Share ρ of a window's items that are masked."""
    last_only: float = Field(0.1, ge=0, le=1)
    """Share of windows whose last item alone is masked, which is what scoring a history looks like."""


class Block(nn.Module):
    """LN(x + Attention(x)), then LN(x + FFN(x)), the FFN being D → 4 D → D with GELU (3.3)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn_in, self.ffn_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, inside: Tensor, rows: Tensor | None = None) -> Tensor:
        """[B, L, D] → [B, L, D], or with ``rows`` [M] → [M, D], the outputs at these of the B L places alone.

        ``inside`` [B, L] marks the places that are read.
        """
        p = self.dropout if self.training else 0.0
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, L, D / H]
        attended = attention(q, k, v, inside[:, None, None], p)
        attended = attended.transpose(1, 2).flatten(-2)
        if rows is not None:
            attended, x = attended.flatten(0, 1)[rows], x.flatten(0, 1)[rows]
        x = self.norm_attention(x + dropout(self.out(attended), p, self.training))
        hidden = self.ffn_out(F.gelu(self.ffn_in(x)))
        return self.norm_ffn(x + dropout(hidden, p, self.training))


class BERT4Rec(SequenceRecommender):
    """Bidirectional Transformer; among its inputs, number N + 1 is the mask."""

    architecture = "BERT4Rec"
    config_class = BERT4RecConfig
    samples = "cloze"

    def __init__(self, config: BERT4RecConfig, items: ItemEncoder) -> None:
        super().__init__(config, items)
        self.mask = nn.Parameter(torch.empty(config.dim))
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.dropout) for _ in range(config.blocks))
        self.head = nn.Sequential(nn.Linear(config.dim, config.dim), nn.GELU(), nn.LayerNorm(config.dim))
        nn.init.normal_(self.mask, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        for module in [*self.blocks.modules(), self.head[0]]:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        """h^L [B, L, D] of items and masks [B, L], without the output head; a mask has no knowledge."""
        return self._encode(items, knowledge)

    def _encode(self, items: Tensor, knowledge: Tensor | None, rows: Tensor | None = None) -> Tensor:
        """``forward``, or with ``rows`` [M] its states [M, D] at these of the B L places: the last block is theirs."""
        self.check_length(items)
        masked = items > self.items.n_items
        vectors = self.items(items.masked_fill(masked, 0), knowledge)  # [B, L, D]
        x = torch.where(masked[..., None], self.mask.to(vectors.dtype), vectors)
        x = x + self.positions(torch.arange(items.shape[1], device=items.device))
        x = dropout(self.norm(x), self.config.dropout, self.training)
        for block in self.blocks[:-1]:
            x = block(x, items > 0)
        return self.blocks[-1](x, items > 0, rows)

    def states_at(self, items: Tensor, where: Tensor, knowledge: Tensor | None = None) -> Tensor:
        # The head is for the M masked places alone (Eq. 7).
        rows = where.flatten().nonzero().squeeze(1)
        # oneDNN makes kernels for every new number of rows.
        padded = F.pad(rows, (0, -len(rows) % ROW_MULTIPLE)) if self.training else rows
        return self.head(self._encode(items, knowledge, padded))[: len(rows)]

    @property
    def reach(self) -> int:
        return self.config.max_length - 1  # the mask has a place too

    def last_states(self, items: Tensor, lengths: Tensor, knowledge: Tensor | None = None) -> Tensor:
        """[B, D] states of a mask that follows each history; where there is no room for it, the oldest item goes."""
        self.check_length(items)
        room = min(items.shape[1] + 1, self.config.max_length)
        cut = (lengths - (room - 1)).clamp(min=0)  # [B]
        places = cut[:, None] + torch.arange(room, device=items.device)  # [B, room]
        last = torch.arange(room, device=items.device) == (lengths - cut)[:, None]
        within = (places < lengths[:, None]) & ~last
        places = places.clamp(max=items.shape[1] - 1)
        shifted = items.gather(1, places) * within
        if knowledge is not None:
            knowledge = knowledge.gather(1, places[..., None].expand(-1, -1, knowledge.shape[-1])) * within[..., None]
        return self.states_at(shifted.masked_fill(last, self.items.n_items + 1), last, knowledge)
