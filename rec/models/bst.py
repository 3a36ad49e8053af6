"""BST, the Behavior Sequence Transformer (Chen et al. 2019): scores one candidate beside the user's history.

The candidate is the last element of the sequence, so attention relates it to every item of the history, and an MLP
reads what comes out at its place (2.3). Batches carry no times: the position of an item is its distance to the
candidate in interactions, where the paper puts seconds into buckets. There are no other features.

It is a ranker: every candidate costs a pass through the MLP, at its published size about 0.8 million multiplications.
Only the last block's output at the candidate's place is read, so with one block (best in the paper) the keys and
values of the history do not depend on the candidate; ``score_all`` computes them once a user.
"""

from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rec.dropout import Dropout
from rec.item_encoder import ItemEncoder
from rec.losses import Loss, binary_cross_entropy
from rec.models.base import Batch, Recommender
from rec.runtime.config import Section

SCORED_ROWS = 2**13  # candidates, times places where those are per candidate, that are in memory at a time


class BSTConfig(Section):
    """Size of a BST, and its negatives; its loss is its own, ``rec.loss`` must be left at its default."""

    name: Literal["BST"] = "BST"
    dim: int = Field(64, ge=1)
    """Width D of item vectors."""
    position_dim: int = Field(16, ge=1)
    """Width P of position vectors; the Transformer works on both side by side, D + P wide."""
    blocks: int = Field(1, ge=1)
    """With more than one, scoring all items costs max_length times as much attention."""
    heads: int = Field(8, ge=1)
    dropout: float = Field(0.2, ge=0, lt=1)
    mlp: tuple[PositiveInt, ...] = (1024, 512, 256)
    """Widths of the MLP's hidden layers."""
    negatives: int = Field(4, ge=1)
    """Items drawn uniformly as negatives for every true next item."""
    max_length: int = Field(50, ge=1)
    """Longest history that is read, in items, without the candidate; earlier ones are cut off."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if (width := self.dim + self.position_dim) % self.heads:
            raise ValueError(f"dim + position_dim = {width} is not divisible by heads {self.heads}")
        return self


class Block(nn.Module):
    """S' = LN(S + Dropout(Attention(S))), then LN(S' + Dropout(FFN(S'))), FFN being E → 4 E → E with LeakyReLU."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.LeakyReLU(inplace=True), nn.Linear(4 * width, width))
        self.norm_attention, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, L, E / H] of x [B, L, E]."""
        k, v = self.key_value(x).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return k, v

    def among(self, x: Tensor, inside: Tensor) -> Tensor:
        """[B, L, E] → [B, L, E], every place attending to the places that ``inside`` [B, L] marks."""
        k, v = self.keys_and_values(x)
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, L, E / H]
        return self._after(x, F.scaled_dot_product_attention(q, k, v, attn_mask=inside[:, None, None]))

    def beside(self, x: Tensor, k: Tensor, v: Tensor, inside: Tensor) -> Tensor:
        """[B, C, E] → [B, C, E]: C candidates, each attending to itself and the history's keys and values k and v."""
        q = self.query(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, H, C, E / H]
        own_k, own_v = self.keys_and_values(x)
        scale = q.shape[-1] ** -0.5
        logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~inside[:, None, None], float("-inf"))  # [B, H, C, L]
        own = (q * own_k).sum(-1, keepdim=True) * scale  # [B, H, C, 1]
        weights = torch.cat([logits, own], dim=-1).softmax(-1)
        return self._after(x, weights[..., :-1] @ v + weights[..., -1:] * own_v)

    def _after(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.norm_attention(x + self.dropout(self.out(attended.transpose(1, 2).flatten(-2))))
        return self.norm_ffn(x + self.dropout(self.ffn(x)))


class BST(Recommender):
    """Target-aware Transformer with an MLP on top."""

    architecture = "BST"
    config_class = BSTConfig
    samples = "prefix"
    has_own_loss = True

    def __init__(self, config: BSTConfig, items: ItemEncoder) -> None:
        super().__init__(config, items)
        width = config.dim + config.position_dim
        self.positions = nn.Embedding(config.max_length + 1, config.position_dim)
        self.blocks = nn.ModuleList(Block(width, config.heads, config.dropout) for _ in range(config.blocks))
        layers: list[nn.Module] = []
        for size in config.mlp:
            layers += [nn.Linear(width, size), nn.LeakyReLU(inplace=True)]
            width = size
        self.mlp = nn.Sequential(*layers, nn.Linear(width, 1))
        nn.init.normal_(self.positions.weight, std=0.02)

    def forward(self, items: Tensor, candidates: Tensor) -> Tensor:
        """Logits [B, C] of ``candidates`` [B, C] as the next item after ``items`` [B, L]."""
        return self.rate(*self.read(items), F.embedding(candidates, self.items.table()))

    def read(self, items: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
        """What no candidate changes: history [B, L, E], its places [B, L] that count, keys and values of one block."""
        inside = items > 0
        distance = inside.sum(1, keepdim=True) - torch.arange(items.shape[1], device=items.device)  # [B, L]
        history = torch.cat([self.items(items), self.positions(distance.clamp(min=0))], dim=-1)
        return history, inside, self.blocks[0].keys_and_values(history) if len(self.blocks) == 1 else None

    def rate(self, history: Tensor, inside: Tensor, shared: tuple[Tensor, Tensor] | None, candidates: Tensor) -> Tensor:
        """Logits [B, C] of the candidates' vectors [B, C, D], from what ``read`` gave."""
        place = self.positions.weight[0].expand(*candidates.shape[:-1], -1)
        x = torch.cat([candidates, place], dim=-1)  # [B, C, E]
        if shared is None:  # every candidate changes all states of the history: from here on B is B · C, and C is 1
            count = candidates.shape[1]
            history, inside = history.repeat_interleave(count, 0), inside.repeat_interleave(count, 0)
            x = x.flatten(0, 1)[:, None]
            for block in self.blocks[:-1]:
                states = block.among(torch.cat([history, x], dim=1), F.pad(inside, (0, 1), value=True))
                history, x = states[:, :-1], states[:, -1:]
            shared = self.blocks[-1].keys_and_values(history)
        return self.mlp(self.blocks[-1].beside(x, *shared, inside)).view(candidates.shape[:-1])

    def training_loss(self, batch: Batch, loss: Loss) -> Tensor:
        """Binary cross-entropy (2.3) of the true next item against uniform negatives."""
        positive = batch.targets.amax(1, keepdim=True)  # [B, 1]
        shape = (len(positive), self.config.negatives)
        negatives = torch.randint(1, self.items.n_items + 1, shape, device=positive.device)
        logits = self(batch.items, torch.cat([positive, negatives], dim=1)).float()
        return binary_cross_entropy(logits[:, 0], logits[:, 1:], negatives == positive)

    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        read = self.read(items)
        per_candidate = len(items) * (1 if len(self.blocks) == 1 else items.shape[1] + 1)
        chunks = self.items.table()[1:].split(max(1, SCORED_ROWS // per_candidate))
        return torch.cat([self.rate(*read, chunk.expand(len(items), -1, -1)) for chunk in chunks], dim=1)
