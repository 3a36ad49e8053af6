"""SASRec (Kang & McAuley 2018): a causal Transformer over the item sequence.

Pre-norm blocks and embeddings of N(0, 0.02) scaled by sqrt(D), trained with full softmax cross-entropy: the form
that reproduces best ("Turning Dross Into Gold Loss", 2023). Right padding and a causal mask need no padding mask:
no state ever sees what comes after it.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rec.attention import HeadsSection, attention, causal_attention
from rec.dropout import dropout
from rec.item_encoder import ItemEncoder
from rec.models.base import SequenceRecommender


class SASRecConfig(HeadsSection):
    """Size of a SASRec."""

    name: Literal["SASRec"] = "SASRec"
    dim: int = Field(64, ge=1)
    """Width D of item vectors and states."""
    blocks: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    max_length: int = Field(100, ge=1)
    """Longest history that is read, in items; earlier ones are cut off."""
    positions: Literal["first", "last"] = "first"
    """Count positions from the first item that is read, or from the last, as left-padded implementations do. From the
    last, a state in the middle of a training sequence knows how many items follow it, which no history tells."""
    item_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the input items that are left out as a whole while training; their positions stay."""
    block: Literal["sasrec", "ligr"] = "sasrec"
    """The paper's, or the gated one with which eSASRec (Tikhonovich et al. 2025) replaces it."""


class Block(nn.Module):
    """x + Attention(LN(x)), then x + FFN(LN(x)), the FFN being D → D → D with ReLU as in the paper (Eq. 5)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn_in, self.ffn_out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, last: Tensor | None = None) -> Tensor:
        """[B, L, D] → [B, L, D], or with ``last`` [B] → [B, 1, D], the outputs at those places alone."""
        x = _at(x, last) + self.attend(self.norm_attention(x), last)
        return x + self.drop(self.ffn_out(self.drop(F.relu(self.ffn_in(self.norm_ffn(x))))))

    def attend(self, x: Tensor, last: Tensor | None = None) -> Tensor:
        """Causal multi-head attention (Eq. 2 to 4) with dropout; ``last`` as in ``forward``."""
        dim, p = x.shape[-1], self.dropout if self.training else 0.0
        if last is None:
            q, k, v = self._heads(self.qkv(x), 3)
            attended = causal_attention(q, k, v, p)
        else:
            (q,) = self._heads(F.linear(_at(x, last), self.qkv.weight[:dim], self.qkv.bias[:dim]), 1)
            k, v = self._heads(F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]), 2)
            past = torch.arange(x.shape[1], device=x.device) <= last[:, None]
            attended = attention(q, k, v, past[:, None, None], p)
        return self.drop(self.out(attended.transpose(1, 2).flatten(-2)))

    def _heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        """``count`` times [B, H, L, d] of [B, L, count D]."""
        return x.unflatten(-1, (count, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def drop(self, x: Tensor) -> Tensor:
        """Dropout."""
        return dropout(x, self.dropout, self.training)


class GatedBlock(Block):
    """x + σ(W_g x) ⊙ Attention(LN(x)), then x + σ(W_h x) ⊙ SwiGLU(LN(x)): LiGR's block, as eSASRec uses it.

    SwiGLU(z) = (SiLU(z W_1) ⊙ z W_2) W_3 with an inner width of 4 D.
    """

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__(dim, heads, dropout)
        self.gate_attention, self.gate_ffn = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.ffn_in, self.ffn_out = nn.Linear(dim, 8 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, last: Tensor | None = None) -> Tensor:
        attended, x = self.attend(self.norm_attention(x), last), _at(x, last)
        x = x + self.gate_attention(x).sigmoid() * attended
        inner, linear = self.ffn_in(self.norm_ffn(x)).chunk(2, -1)
        return x + self.gate_ffn(x).sigmoid() * self.drop(self.ffn_out(F.silu(inner) * linear))


BLOCKS = {"sasrec": Block, "ligr": GatedBlock}


class SASRec(SequenceRecommender):
    """Self-attentive sequential recommendation."""

    architecture = "SASRec"
    config_class = SASRecConfig
    samples = "next-item"

    def __init__(self, config: SASRecConfig, items: ItemEncoder) -> None:
        super().__init__(config, items)
        self.positions = nn.Embedding(config.max_length, config.dim)
        block = BLOCKS[config.block]
        self.blocks = nn.ModuleList(block(config.dim, config.heads, config.dropout) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.positions.weight, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        x = self._inputs(items, knowledge)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def last_states(self, items: Tensor, lengths: Tensor, knowledge: Tensor | None = None) -> Tensor:
        x = self._inputs(items, knowledge)
        for block in self.blocks[:-1]:
            x = block(x)
        return self.norm(self.blocks[-1](x, lengths - 1)).squeeze(1)

    def _inputs(self, items: Tensor, knowledge: Tensor | None) -> Tensor:
        self.check_length(items)
        steps = torch.arange(items.shape[1], device=items.device)
        if self.config.positions == "last":
            steps = ((items > 0).sum(1, keepdim=True) - 1 - steps).clamp(min=0)
        x = self.items(items, knowledge) * math.sqrt(self.config.dim)
        if self.training and self.config.item_dropout:
            kept = torch.rand(items.shape, device=items.device) >= self.config.item_dropout
            x = x * kept[..., None]
        return dropout(x + self.positions(steps), self.config.dropout, self.training)


def _at(x: Tensor, places: Tensor | None) -> Tensor:
    """[B, 1, D]: of x [B, L, D] the places [B]; all of x if there are none."""
    return x if places is None else x[torch.arange(len(x), device=x.device), places][:, None]
