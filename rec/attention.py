"""Scaled dot-product attention, fast on a CPU with dropout too, and the check that its heads fit."""

from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor
from torch.nn import functional as F

from rec.dropout import dropout
from rec.runtime.config import Section


class HeadsSection(Section):
    """A section with a width ``dim`` that ``heads`` must divide."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        return self


def better_in_float32(q: Tensor) -> bool:
    """Whether fused attention is to be computed in float32: on a CPU its backward pass takes six times as long in
    bfloat16, while the forward pass is nearly as fast."""
    return not q.is_cuda and q.dtype == torch.bfloat16 and torch.is_grad_enabled()


def _fused(q: Tensor, k: Tensor, v: Tensor, p: float, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    if not better_in_float32(q):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, is_causal=is_causal)
    with torch.autocast("cpu", enabled=False):
        inputs = q.float(), k.float(), v.float()
        return F.scaled_dot_product_attention(*inputs, attn_mask=mask, dropout_p=p, is_causal=is_causal).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """softmax(q kᵀ / √d) v, [B, h, Q, d], for q [B, h, Q, d], k and v [B, h, K, d], with dropout ``p`` on the weights.

    ``mask`` marks what may be attended to, and broadcasts to [B, h, Q, K]; None is everything.
    """
    if p == 0 or q.is_cuda:
        return _fused(q, k, v, p, mask)
    # torch has no fused attention with dropout on CPU, and its plain one draws a slow random number for each weight.
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return dropout(scores.softmax(-1), p, True) @ v


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """``attention`` of [B, h, L, d] to the past and the present."""
    if p == 0 or q.is_cuda:
        return _fused(q, k, v, p, is_causal=True)
    past = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return attention(q, k, v, past, p)
