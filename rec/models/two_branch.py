"""Attention in two branches, items and positions: what LightSANs and PAUP have in common.

One layer, with X [L, D] its input, P [L, D] trainable position vectors and d = D / heads, in every head:

    Q, K, V = X W_Q + b, X W_K + b, X W_V + b
    C_item  = softmax(Q K'ᵀ / √d) V'         K', V' [m, D] short summaries of K and V: each model's own
    C_pos   = softmax(Q_p K_pᵀ / √d) V       Q_p, K_p linear maps of LN(Z), Z [L, D] each model's own
    H       = LN(X + (C_item + C_pos) W_O + b)
    output  = LN(H + FFN(H))                 FFN: D → inner → D with GELU

The first X is LN of the item vectors; the state of a history is the last layer's output at its last item. Summaries
look ahead, so every prefix of a sequence is a forward pass of its own. What is linear is done where there is least
of it: summaries are made of X and then projected, and in the last layer, of which only the last item's row is read,
W_K goes to its one query and W_V to the mean of the items that it makes, so that neither is applied to every item.
(Two models' worth of code, hence the length of this file.)

``attention: paper`` is the above with row-wise softmax and with padding left out of everything, so that a state
depends on its history alone. ``attention: reference`` is what the authors published and RecBole took over: softmax
runs over the queries, down each column, position scores are divided by √(2d) once more, and padding up to max_length
is treated like items; trained weights of theirs give the same states. The paper's is the default: under the
reference a score changes with max_length, and every prefix costs as much as the longest.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rec.attention import HeadsSection, attention
from rec.dropout import dropout
from rec.item_encoder import ItemEncoder
from rec.models.base import SequenceRecommender

REFERENCE_EPS = 1e-12


class TwoBranchConfig(HeadsSection):
    """Size of a model with attention in two branches."""

    name: str
    dim: int = Field(64, ge=1)
    """Width D of item vectors and states."""
    blocks: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    inner: int = Field(256, ge=1)
    """Width of the FFN's hidden layer."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """On the input, on item attention, and after each half of a layer."""
    max_length: int = Field(100, ge=1)
    """Longest history that is read, in items; earlier ones are cut off."""
    attention: Literal["paper", "reference"] = "paper"
    """The equations with padding masked, or exactly the authors' code (see rec/models/two_branch.py)."""


def eps_of(config: TwoBranchConfig) -> float:
    """Of every LayerNorm. The papers give none; the authors' lets a state of zeros have gradients of 1e6 a norm."""
    return REFERENCE_EPS if config.attention == "reference" else 1e-5


class Layer(nn.Module):
    """One layer; ``summarise`` and ``position_input`` make it LightSANs' or PAUP's."""

    def __init__(self, config: TwoBranchConfig) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.dropout, self.reference = config.heads, config.dropout, config.attention == "reference"
        self.position_scale = (2 * dim // config.heads) ** -0.5 if self.reference else 1.0
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.position_query, self.position_key = (nn.Linear(dim, dim) for _ in range(2))
        self.out = nn.Linear(dim, dim)
        self.ffn_in, self.ffn_out = nn.Linear(dim, config.inner), nn.Linear(config.inner, dim)
        eps = eps_of(config)
        self.norm_position, self.norm_attention, self.norm_ffn = (nn.LayerNorm(dim, eps=eps) for _ in range(3))
        for module in self.children():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def summarise(self, x: Tensor, inside: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """K' and V' [B, m, D] of K and V, which ``key`` and ``value`` make of x [B, L, D].

        ``inside`` [B, L] marks items, None takes all places as they are. Also which of the m exist, [B, m] (None: all).
        """
        raise NotImplementedError

    def position_input(self, x: Tensor, positions: Tensor) -> Tensor:
        """Z [1 or B, L, D] of the layer's input [B, L, D] and the position vectors [L, D]."""
        raise NotImplementedError

    def forward(self, x: Tensor, positions: Tensor, inside: Tensor | None, last: Tensor | None = None) -> Tensor:
        """[B, L, D] → [B, L, D], or with ``last`` [B] → [B, 1, D], the outputs at those places alone."""
        p = self.dropout if self.training else 0.0
        keys_short, values_short, exists = self.summarise(x, inside)
        z = self.norm_position(self.position_input(x, positions))
        # Softmax over the queries needs all of them, even for one row of the result.
        asking = None if self.reference else last
        context = self._attend(self.query(_at(x, asking)), keys_short, values_short, exists, last, p)
        position_queries = self.position_query(_at(z, asking)) * self.position_scale
        if asking is None:
            keys, values = self.position_key(z), self.value(x)
            context = context + self._attend(position_queries, keys, values, inside, last, 0.0)
        else:
            context = context + self._look_back(position_queries, z, x, inside)
        x = _at(x, last)
        x = self.norm_attention(x + dropout(self.out(context), p, True))
        return self.norm_ffn(x + dropout(self.ffn_out(F.gelu(self.ffn_in(x))), p, True))

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, exists: Tensor | None, last: Tensor | None, p: float
    ) -> Tensor:
        """C [B, Q, D] of queries [B, Q, D], keys and values [B, K, D]; B may be 1 where all histories agree.

        ``exists`` [B, K] marks the keys that there are (None: all), ``last`` as in ``forward``, ``p`` drops weights.
        """
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (queries, keys, values))  # [B, h, ., d]
        if self.reference:
            weights = (q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)).softmax(2)
            weights = _at(weights.transpose(1, 2), last).transpose(1, 2)
            context = dropout(weights, p, True) @ v
        else:
            mask = None if exists is None else exists[:, None, None]
            context = attention(q.expand(len(v), -1, -1, -1), k.expand(len(v), -1, -1, -1), v, mask, p)
        return context.transpose(1, 2).flatten(2)

    def _look_back(self, queries: Tensor, z: Tensor, x: Tensor, inside: Tensor) -> Tensor:
        """C_pos [B, 1, D] for the one query [B, 1, D] of each history.

        In each head q (z W_K + b)ᵀ = (q W_Kᵀ) zᵀ + q bᵀ, and Σ w (x W_V + b) = (Σ w x) W_V + b, for the weights w add
        up to 1.
        """
        by_head = (self.heads, -1)
        q = queries.squeeze(1).unflatten(-1, by_head)  # [B, h, d]
        to_keys, to_values = (part.weight.unflatten(0, by_head) for part in (self.position_key, self.value))
        asked = torch.einsum("bhd,hde->bhe", q, to_keys)  # to_keys is [h, d, D]
        scores = asked @ z.transpose(1, 2) + (q * self.position_key.bias.unflatten(0, by_head)).sum(-1, keepdim=True)
        scores = (scores * q.shape[-1] ** -0.5).masked_fill(~inside[:, None], -torch.inf)  # [B, h, L]
        means = scores.softmax(-1).to(x.dtype) @ x  # [B, h, D]
        context = torch.einsum("bhe,hde->bhd", means, to_values) + self.value.bias.unflatten(0, by_head)
        return context.flatten(1)[:, None]


class TwoBranch(SequenceRecommender):
    """Layers of ``layer`` over item vectors, prefix by prefix."""

    samples = "prefix"
    layer: ClassVar[type[Layer]]

    def __init__(self, config: TwoBranchConfig, items: ItemEncoder) -> None:
        super().__init__(config, items)
        self.positions = nn.Embedding(config.max_length, config.dim)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.norm = nn.LayerNorm(config.dim, eps=eps_of(config))
        items.begin_reading()
        self.layers = nn.ModuleList(self.layer(config) for _ in range(config.blocks))

    def states_at(self, items: Tensor, where: Tensor, knowledge: Tensor | None = None) -> Tensor:
        rows, places = where.nonzero(as_tuple=True)
        if self.config.attention == "reference":  # it looks at padding, of which every prefix has its own
            steps = torch.arange(items.shape[1], device=items.device)
            prefixes = items[rows] * (steps <= places[:, None])
            given = None if knowledge is None else knowledge.index_select(0, rows)
            return self.last_states(prefixes, places + 1, given)
        self.check_length(items)
        # Once for all prefixes of a history.
        read = self.norm(self.items(items, knowledge))[:, : int(places.max()) + 1]
        return self._last_states(read.index_select(0, rows), places + 1)

    def last_states(self, items: Tensor, lengths: Tensor, knowledge: Tensor | None = None) -> Tensor:
        self.check_length(items)
        # While a graph is traced there are no lengths to look at; padding changes no state, it only costs time.
        longest = items.shape[1] if torch.compiler.is_exporting() else int(lengths.max())
        length = self.config.max_length if self.config.attention == "reference" else longest
        extra = length - items.shape[1]
        items = F.pad(items, (0, extra))
        if knowledge is not None:
            # Padding has no knowledge; the reference would read it.
            inside = torch.arange(length, device=items.device) < lengths[:, None]
            knowledge = F.pad(knowledge, (0, 0, 0, extra)) * inside[..., None]
        return self._last_states(self.norm(self.items(items, knowledge)), lengths)

    def _last_states(self, read: Tensor, lengths: Tensor) -> Tensor:
        """[B, D] of histories whose items were read as ``read`` [B, L, D]; what is behind ``lengths`` is padding."""
        x = dropout(read, self.config.dropout, self.training)
        positions = self.positions.weight[: read.shape[1]]
        inside = torch.arange(read.shape[1], device=read.device) < lengths[:, None]
        mask = None if self.config.attention == "reference" else inside
        for layer in self.layers[:-1]:
            x = layer(x, positions, mask)
        return self.layers[-1](x, positions, mask, lengths - 1).squeeze(1)


def _at(x: Tensor, places: Tensor | None) -> Tensor:
    """[B, 1, ...]: of x [1 or B, L, ...] the places [B]; all of x if there are none."""
    if places is None:
        return x
    if len(x) == 1:  # indexing would add up the gradients of a place in any order
        return x[0].index_select(0, places)[:, None]
    return x[torch.arange(len(places), device=x.device), places][:, None]
