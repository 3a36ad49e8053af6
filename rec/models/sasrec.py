"""SASRec (Kang & McAuley 2018): a causal Transformer over the item sequence.

Pre-norm blocks and embeddings of N(0, 0.02) scaled by sqrt(D), trained with full softmax cross-entropy: the form
that reproduces best ("Turning Dross Into Gold Loss", 2023). Right padding and a causal mask need no padding mask:
no state ever sees what comes after it.
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


class SASRecConfig(Section):
    """Size of a SASRec."""

    name: Literal["SASRec"] = "SASRec"
    dim: int = Field(64, ge=1)
    """Width D of item vectors and states."""
    blocks: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    max_length: int = Field(100, ge=1)
    """Longest history that is read, in items; earlier ones are cut off."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        return self


class Block(nn.Module):
    """x + Attention(LN(x)), then x + FFN(LN(x)), the FFN being D → D → D with ReLU as in the paper (Eq. 5)."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.ffn_in, self.ffn_out = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, D]."""
        p = self.dropout if self.training else 0.0
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = causal_attention(q, k, v, p)
        x = x + dropout(self.out(attended.transpose(1, 2).flatten(-2)), p, self.training)
        hidden = dropout(F.relu(self.ffn_in(self.norm_ffn(x))), p, self.training)
        return x + dropout(self.ffn_out(hidden), p, self.training)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Attention [B, H, L, d] to the past and the present, with dropout ``p`` on its weights (Eq. 2)."""
    if p == 0 or q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
    # torch has no fused attention with dropout on CPU, and its plain one draws a slow random number for each weight.
    length = q.shape[2]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).masked_fill(future, float("-inf")).softmax(-1)
    return dropout(weights, p, True) @ v


class SASRec(SequenceRecommender):
    """Self-attentive sequential recommendation."""

    architecture = "SASRec"
    config_class = SASRecConfig
    samples = "next-item"

    def __init__(self, config: SASRecConfig, items: ItemEncoder) -> None:
        super().__init__(config, items)
        self.positions = nn.Embedding(config.max_length, config.dim)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.dropout) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.positions.weight, std=0.02)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        self.check_length(items)
        steps = torch.arange(items.shape[1], device=items.device)
        x = self.items(items, knowledge) * math.sqrt(self.config.dim) + self.positions(steps)
        x = dropout(x, self.config.dropout, self.training)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
