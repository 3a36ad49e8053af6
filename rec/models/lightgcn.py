"""LightGCN (He et al. 2020): vectors of users and items, smoothed over the graph of who interacted with what.

No order and no history is read: a user is known by number alone, one without training interactions keeps a vector
that nothing has trained. The loss is the paper's own (Eq. 15), ``rec.loss`` must be left at its default. An item has
one vector, that of the item encoder's input side: it carries knowledge even where ``on_target`` is false.
"""

import warnings
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rec.data.prepared import Prepared
from rec.item_encoder import ItemEncoder
from rec.losses import Loss, bpr
from rec.models.base import Batch, Recommender
from rec.runtime.config import Section
from rec.runtime.errors import UserError


class LightGCNConfig(Section):
    """Size of a LightGCN."""

    name: Literal["LightGCN"] = "LightGCN"
    dim: int = Field(64, ge=1)
    """Width D of the vectors."""
    layers: int = Field(3, ge=0)
    """K, how far the vectors travel; 0 is matrix factorisation."""
    combine: Literal["mean", "sum"] = "mean"
    """Of the vectors of layers 0 to K: the mean (α = 1 / (K + 1) in Eq. 4), or the sum as LMRec words it."""
    l2: float = Field(1e-4, ge=0)
    """λ, on the layer-0 vectors of a batch's users, items and negatives."""
    max_length: int = Field(1, ge=1)
    """Of histories, which are not read."""


class _Propagate(torch.autograd.Function):
    """Â E (Eq. 7). Â is symmetric, so the gradient of E is Â times that of the product; PyTorch would transpose Â."""

    @staticmethod
    def forward(ctx, adjacency: Tensor, vectors: Tensor) -> Tensor:
        ctx.adjacency = adjacency
        with torch.autocast(vectors.device.type, enabled=False):  # sparse products know no bfloat16
            return adjacency @ vectors.float()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor]:
        return None, _Propagate.apply(ctx.adjacency, grad.contiguous())


class LightGCN(Recommender):
    """Light graph convolution.

    Args:
        config: its size.
        items: encoder of items 1 to N.
        users: number of users U.
        edges: training interactions [edges], each once, as sorted numbers user · (N + 1) + item.
    """

    architecture = "LightGCN"
    config_class = LightGCNConfig
    samples = "pairs"
    has_own_loss = True

    def __init__(self, config: LightGCNConfig, items: ItemEncoder, users: int, edges: Tensor) -> None:
        super().__init__(config, items)
        self.users = nn.Embedding(users, config.dim)
        nn.init.normal_(self.users.weight, std=0.02)  # as an ID table of items
        self.register_buffer("edges", edges)
        # Not buffers: made from what is saved, and kept with what they were made from.
        self._adjacency: tuple[Any, Tensor] | None = None
        self._final: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    @classmethod
    def for_data(cls, config: LightGCNConfig, items: ItemEncoder, data: Prepared, ends: Tensor) -> "LightGCN":
        known = ends > data.offsets[:-1]
        for part in ("valid", "test"):
            asked = data.instances(part)[0]
            if len(asked) and not known[asked].any():
                raise UserError(
                    f"{cls.architecture} knows the users that it is trained on, and {data.folder} trains on none of the"
                    f" {part} users: split it otherwise, or take a model that reads histories"
                )
        sizes = data.offsets.diff()
        users = torch.repeat_interleave(torch.arange(data.n_users), sizes)
        trained = torch.arange(len(data.sequence)) < torch.repeat_interleave(ends, sizes)
        edges = (users * (items.n_items + 1) + data.sequence)[trained].unique()
        return cls(config, items, data.n_users, edges)

    def extra_settings(self) -> dict[str, Any]:
        return {"users": self.users.num_embeddings, "edges": len(self.edges)}

    @classmethod
    def build_empty(cls, config: LightGCNConfig, items: ItemEncoder, users: int, edges: int) -> "LightGCN":
        return cls(config, items, users, torch.zeros(edges, dtype=torch.long))

    def adjacency(self) -> Tensor:
        """Â = D^-1/2 A D^-1/2 [U + N, U + N], sparse; users come first."""
        state = self.edges.data_ptr(), self.edges._version
        if self._adjacency is None or self._adjacency[0] != state:
            n_users, stride = self.users.num_embeddings, self.items.n_items + 1
            user, item = self.edges // stride, self.edges % stride - 1 + n_users
            both, size = torch.stack([torch.cat([user, item]), torch.cat([item, user])]), n_users + stride - 1
            degree = torch.bincount(both[0], minlength=size).float()
            values = (degree[both[0]] * degree[both[1]]).rsqrt()  # 1 / (√|N_u| √|N_i|), Eq. 3
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")
                sparse = torch.sparse_coo_tensor(both, values, (size, size), check_invariants=False).to_sparse_csr()
            self._adjacency = state, sparse
        return self._adjacency[1]

    def layer_zero(self) -> Tensor:
        """E⁰ [U + N, D]: the vectors of users and items before any propagation."""
        numbers = torch.arange(1, self.items.n_items + 1, device=self.edges.device)
        return torch.cat([self.users.weight, self.items(numbers)])

    def forward(self, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Final vectors of users [U, D] and items [N, D] from E⁰ (Eq. 4 and 8)."""
        vectors = total = zero.float()
        for _ in range(self.config.layers):
            vectors = _Propagate.apply(self.adjacency(), vectors)
            total = total + vectors
        if self.config.combine == "mean":
            total = total / (self.config.layers + 1)
        return total.tensor_split([self.users.num_embeddings])

    def training_loss(self, batch: Batch, loss: Loss) -> Tensor:
        """-ln σ(ŷ_ui - ŷ_uj) with one drawn j a pair, plus λ/2 of the squared layer-0 vectors a pair (Eq. 15)."""
        users, positives, stride = batch.users, batch.targets[:, 0], self.items.n_items + 1
        negatives = torch.randint(1, stride, positives.shape, device=positives.device)
        drawn = users * stride + negatives
        known = self.edges[torch.searchsorted(self.edges, drawn).clamp(max=len(self.edges) - 1)] == drawn
        zero = self.layer_zero()
        final_users, final_items = self(zero)
        # By lookups, whose gradients are the same bits on any number of threads; those of indexing are not.
        of_users = F.embedding(users, final_users)
        scores = [(of_users * F.embedding(items - 1, final_items)).sum(-1) for items in (positives, negatives)]
        drawn_items = torch.cat([positives, negatives]) - 1 + self.users.num_embeddings
        penalty = F.embedding(torch.cat([users, drawn_items]), zero).square().sum() / (2 * len(users))
        return bpr(scores[0], scores[1][:, None], known[:, None]) + self.config.l2 * penalty

    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        final_users, final_items = self._kept()
        return final_users[users] @ final_items.T

    def train(self, mode: bool = True) -> Self:
        self._final = None
        return super().train(mode)

    def _kept(self) -> tuple[Tensor, Tensor]:
        """Final vectors, computed once an evaluation; E⁰ is compared, for a fused optimizer counts no versions."""
        zero, adjacency = self.layer_zero(), self.adjacency()
        if self.training or torch.is_grad_enabled():
            return self(zero)
        kept = self._final
        if kept is None or kept[0] is not adjacency or not torch.equal(kept[1], zero):
            kept = self._final = adjacency, zero, self(zero)
        return kept[2]
