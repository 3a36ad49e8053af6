"""LightSANs (Fan et al. 2021): items attend to k latent interests of the user, and positions only to positions.

Layers as in ``rec/models/two_branch.py``; LightSANs' own are

    K' = Dᵀ K,  D = softmax over items of K Θ_K   [L, k]     item-to-interest aggregation, Θ [D, k]; V' alike by Θ_V
    Z  = P                                                   decoupled positions: they never meet an item

K = X W_K + b is not made: D is the softmax of X (W_K Θ_K), for b Θ_K is the same for all items, and Dᵀ K is
(Dᵀ X) W_K + b, for each of D's columns adds up to 1. Q_p and K_p are the same for all histories, and are computed once
for a batch. Their product is not kept: fused attention makes it anew for each history in less time than reading
[B, L, L] weights takes.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rec.models.two_branch import Layer, TwoBranch, TwoBranchConfig


class LightSANsConfig(TwoBranchConfig):
    """Size of a LightSANs."""

    name: Literal["LightSANs"] = "LightSANs"
    interests: int = Field(5, ge=1)
    """Latent interests k; the authors take a tenth of max_length."""


class LightSANsLayer(Layer):
    """Attention to interests."""

    def __init__(self, config: LightSANsConfig) -> None:
        super().__init__(config)
        self.theta_keys = nn.Parameter(torch.randn(config.dim, config.interests))
        self.theta_values = nn.Parameter(torch.randn(config.dim, config.interests))

    def summarise(self, x: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        thetas = [self.key.weight.T @ self.theta_keys, self.value.weight.T @ self.theta_values]
        for_keys, for_values = aggregate(x, torch.cat(thetas, dim=1), inside).chunk(2, dim=1)
        return self.key(for_keys), self.value(for_values), None

    def position_input(self, x: Tensor, positions: Tensor) -> Tensor:
        return positions[None]


def aggregate(x: Tensor, theta: Tensor, inside: Tensor | None) -> Tensor:
    """Interests [B, k, D] of x [B, L, D]: each a mean of the items, weighted by their relevance to it."""
    relevance = x @ theta  # [B, L, k]
    if inside is not None:
        relevance = relevance.masked_fill(~inside[..., None], -torch.inf)
    return relevance.softmax(1).transpose(1, 2) @ x


class LightSANs(TwoBranch):
    """Low-rank decomposed self-attention."""

    architecture = "LightSANs"
    config_class = LightSANsConfig
    layer = LightSANsLayer
