"""Where an item's vector comes from: one replaceable part of every sequence model.

An item encoder turns item numbers into input vectors and gives the table that user states are scored against.
"""

import torch
from torch import Tensor, nn


class ItemEncoder(nn.Module):
    """Base of all item encoders.

    Args:
        n_items: items are numbered from 1; number 0 is padding.
        dim: width D of the vectors.
    """

    kind = ""

    def __init__(self, n_items: int, dim: int) -> None:
        super().__init__()
        self.n_items, self.dim = n_items, dim
        self.ids = nn.Embedding(n_items + 1, dim, padding_idx=0)
        nn.init.normal_(self.ids.weight, std=0.02)
        with torch.no_grad():
            self.ids.weight[0].zero_()

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        """Input vectors [..., D] of ``items`` [...]; ``knowledge`` [..., K] replaces the stored knowledge vectors."""
        raise NotImplementedError

    def table(self) -> Tensor:
        """[N + 1, D] vectors that states are scored against; row 0 is padding."""
        raise NotImplementedError

    def settings(self) -> dict[str, int | bool]:
        """What ``build`` needs to make an empty copy."""
        return {"n_items": self.n_items, "dim": self.dim}


class IDTable(ItemEncoder):
    """One trainable vector an item, for input and output alike."""

    kind = "id"

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        if knowledge is not None:
            raise ValueError("an ID table reads no knowledge")
        return self.ids(items)

    def table(self) -> Tensor:
        return self.ids.weight


class KnowledgeConcat(ItemEncoder):
    """r = W [r_id ; r_s]: the ID vector concatenated with the vector of the item's knowledge text (SeRALM, 4.3).

    The paper adds knowledge to "the input fed into the ID-based recommender"; it does not say whether the scored
    candidates carry it. By default they are the ID vectors, as in RecBole's models with feature fields;
    ``on_target=True`` scores against r instead.

    Args:
        n_items: items are numbered from 1.
        dim: width D of ID and output vectors.
        knowledge_dim: width K of the knowledge vectors.
        on_target: whether candidates are scored with knowledge too.
        dropout: on the knowledge vector while training.
    """

    kind = "knowledge"

    def __init__(
        self, n_items: int, dim: int, knowledge_dim: int, on_target: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__(n_items, dim)
        self.knowledge_dim, self.on_target, self.dropout = knowledge_dim, on_target, dropout
        self.fuse = nn.Linear(dim + knowledge_dim, dim, bias=False)
        with torch.no_grad():
            # Start as the ID model, and let the knowledge in as far as it helps.
            self.fuse.weight.zero_()
            self.fuse.weight[:, :dim] = torch.eye(dim)
        self.register_buffer("knowledge", torch.zeros(n_items + 1, knowledge_dim))

    def set_knowledge(self, vectors: Tensor) -> None:
        """Store the knowledge vectors [N, K] of items 1 to N.

        Raises:
            ValueError: on another shape, or values that are not finite.
        """
        if vectors.shape != (self.n_items, self.knowledge_dim):
            raise ValueError(
                f"knowledge vectors are {tuple(vectors.shape)}, not ({self.n_items}, {self.knowledge_dim})"
            )
        if not torch.isfinite(vectors).all():
            raise ValueError("knowledge vectors are not all finite")
        self.knowledge[1:] = vectors

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        vectors = self.knowledge[items] if knowledge is None else knowledge
        vectors = nn.functional.dropout(vectors, self.dropout, self.training)
        return self.fuse(torch.cat([self.ids(items), vectors], dim=-1))

    def table(self) -> Tensor:
        if not self.on_target:
            return self.ids.weight
        return self.fuse(torch.cat([self.ids.weight, self.knowledge], dim=-1))

    def settings(self) -> dict[str, int | bool]:
        return {
            **super().settings(),
            "knowledge_dim": self.knowledge_dim,
            "on_target": self.on_target,
            "dropout": self.dropout,
        }


ITEM_ENCODERS: dict[str, type[ItemEncoder]] = {cls.kind: cls for cls in (IDTable, KnowledgeConcat)}


def build(kind: str, settings: dict[str, int | bool]) -> ItemEncoder:
    """An empty item encoder of ``kind``."""
    return ITEM_ENCODERS[kind](**settings)
