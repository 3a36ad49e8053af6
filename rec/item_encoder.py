"""Where an item's vector comes from: one replaceable part of every sequence model.

An item encoder turns item numbers into input vectors and gives the table that user states are scored against.
"""

import math
from importlib.metadata import entry_points
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rec.runtime.errors import UserError

ENTRY_POINTS = "recalign.item_encoders"
ID_STD = 0.02
SMALLEST_DEVIATION = 1e-3  # of an entry that is the same in all texts, which tells nothing


class ItemEncoder(nn.Module):
    """Base of all item encoders.

    Args:
        n_items: items are numbered from 1; number 0 is padding.
        dim: width D of the vectors.

    Attributes:
        kind: its name on disk.
    """

    kind: ClassVar[str] = ""

    def __init__(self, n_items: int, dim: int) -> None:
        super().__init__()
        self.n_items, self.dim = n_items, dim

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        """Input vectors [..., D] of ``items`` [...]; ``knowledge`` [..., K] replaces the stored knowledge vectors."""
        raise NotImplementedError

    def table(self) -> Tensor:
        """[N + 1, D] vectors that states are scored against; row 0 is padding."""
        raise NotImplementedError

    def begin_reading(self) -> None:
        """Called by models that normalise an item's vector before anything is added to it: it must not be all zeros,
        where such a norm has next to no bound on its gradient."""

    def refresh(self) -> None:
        """Bring up to date what is computed from trained weights and kept; called before ranking and saving."""

    def own_rates(self) -> dict[float, list[nn.Parameter]]:
        """Parameters that are trained at a learning rate of their own, by that rate."""
        return {}

    def settings(self) -> dict[str, Any]:
        """What ``build`` needs to make an empty copy."""
        return {"n_items": self.n_items, "dim": self.dim}


class IDTable(ItemEncoder):
    """One trainable vector an item, for input and output alike."""

    kind = "id"

    def __init__(self, n_items: int, dim: int) -> None:
        super().__init__(n_items, dim)
        self.ids = _new_ids(n_items, dim)

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        _refuse(knowledge, "an ID table")
        return self.ids(items)

    def table(self) -> Tensor:
        return self.ids.weight


class VectorTable(ItemEncoder):
    """A table that begins as given item vectors, then trained on or kept frozen ("embedding-init", Elephant, 4.1).

    Args:
        n_items: items are numbered from 1.
        dim: width D that the recommender works in.
        vector_dim: width K of the given vectors.
        trainable: whether training changes the vectors; a projection is always trained.
        projection: learn a linear map K → D; without it K must equal D.
    """

    kind = "vectors"

    def __init__(
        self, n_items: int, dim: int, vector_dim: int, trainable: bool = True, projection: bool = False
    ) -> None:
        super().__init__(n_items, dim)
        self.vector_dim, self.trainable = vector_dim, trainable
        self.projection = _new_projection(vector_dim, dim, projection)
        self.vectors = nn.Embedding(n_items + 1, vector_dim, padding_idx=0)
        self.vectors.weight.requires_grad_(trainable)
        nn.init.zeros_(self.vectors.weight)

    def set_vectors(self, vectors: Tensor) -> None:
        """Store the vectors [N, K] of items 1 to N; raises ValueError on another shape or values not finite."""
        _check(vectors, self.n_items, self.vector_dim, "item vectors")
        with torch.no_grad():
            self.vectors.weight[1:] = vectors

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        _refuse(knowledge, "a table of vectors")
        return _project(self.vectors(items), self.projection)

    def table(self) -> Tensor:
        return _project(self.vectors.weight, self.projection)

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "vector_dim": self.vector_dim,
            "trainable": self.trainable,
            "projection": self.projection is not None,
        }


class IDPlusVectors(ItemEncoder):
    """A trainable ID vector plus a fixed one (Elephant, Table 5), on both sides.

    Args:
        n_items: items are numbered from 1.
        dim: width D.
        vector_dim: width K of the fixed vectors.
        projection: learn a linear map K → D; without it K must equal D.
    """

    kind = "id+vectors"

    def __init__(self, n_items: int, dim: int, vector_dim: int, projection: bool = False) -> None:
        super().__init__(n_items, dim)
        self.vector_dim = vector_dim
        self.projection = _new_projection(vector_dim, dim, projection)
        self.ids = _new_ids(n_items, dim)
        self.register_buffer("vectors", torch.zeros(n_items + 1, vector_dim))

    def set_vectors(self, vectors: Tensor) -> None:
        """Store the vectors [N, K] of items 1 to N; raises ValueError on another shape or values not finite."""
        _check(vectors, self.n_items, self.vector_dim, "item vectors")
        self.vectors[1:] = vectors

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        _refuse(knowledge, "ID plus vectors")
        return self.ids(items) + _project(self.vectors[items], self.projection)

    def table(self) -> Tensor:
        return self.ids.weight + _project(self.vectors, self.projection)

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "vector_dim": self.vector_dim,
            "projection": self.projection is not None,
        }


class KnowledgeConcat(ItemEncoder):
    """r = W [r_id ; r_s]: the ID vector concatenated with the vector of the item's knowledge text (SeRALM, 4.3).

    The paper adds knowledge to "the input fed into the ID-based recommender"; it does not say whether the scored
    candidates carry it. By default they are the ID vectors, as in RecBole's models with feature fields;
    ``on_target=True`` scores against r instead.

    The vectors of texts of one kind have most of their length in common. ``standardise`` takes each of their K entries
    to mean 0 and variance 1 over the catalog that ``set_knowledge`` saw first, for later and fresh vectors too; a
    vector of zeros, no text, stays one.

    A recommender can come to know its training sequences by the IDs alone, and then learns nothing from the texts.
    ``id_dropout`` and several texts an item, of which training reads a random one each time, are the two remedies.

    Args:
        n_items: items are numbered from 1.
        dim: width D of ID and output vectors.
        knowledge_dim: width K of the knowledge vectors.
        on_target: whether candidates are scored with knowledge too.
        dropout: on the knowledge vector while training.
        standardise: whether vectors are standardised before they are read.
        id_dropout: share of the items of histories whose ID vector is left out while training.
    """

    kind = "knowledge"

    def __init__(
        self,
        n_items: int,
        dim: int,
        knowledge_dim: int,
        on_target: bool = False,
        dropout: float = 0.0,
        standardise: bool = False,
        id_dropout: float = 0.0,
    ) -> None:
        super().__init__(n_items, dim)
        self.knowledge_dim, self.on_target, self.dropout = knowledge_dim, on_target, dropout
        self.standardise, self.id_dropout = standardise, id_dropout
        self.ids = _new_ids(n_items, dim)
        self.fuse = nn.Linear(dim + knowledge_dim, dim, bias=False)
        with torch.no_grad():
            # Start as the ID model, and let the knowledge in as far as it helps.
            self.fuse.weight.zero_()
            self.fuse.weight[:, :dim] = torch.eye(dim)
        self.register_buffer("knowledge", torch.zeros(n_items + 1, knowledge_dim))
        self.register_buffer("draws", None, persistent=False)  # [N + 1, m, K] where items have several texts
        if standardise:
            self.register_buffer("mean", torch.zeros(knowledge_dim))
            self.register_buffer("deviation", torch.zeros(knowledge_dim))  # zeros: none seen yet

    def begin_reading(self) -> None:
        """An item that has lost its ID (``id_dropout``) is its knowledge alone: of the size of an ID from the start."""
        if self.id_dropout:
            nn.init.normal_(self.fuse.weight[:, self.dim :], std=ID_STD / math.sqrt(self.knowledge_dim))

    def set_knowledge(self, vectors: Tensor) -> None:
        """Store the knowledge vectors of items 1 to N: [N, K], or [N, m, K] for m texts an item.

        The first of several is the one that is read but in training, and saved.

        Raises:
            ValueError: on another shape, or values that are not finite.
        """
        several = vectors if vectors.dim() == 3 else vectors[:, None]
        _check(several[:, 0], self.n_items, self.knowledge_dim, "knowledge vectors")
        _check(several.flatten(0, 1), self.n_items * several.shape[1], self.knowledge_dim, "knowledge vectors")
        self.knowledge[1:] = several[:, 0]
        self.draws = None
        if several.shape[1] > 1:
            self.draws = torch.cat([several.new_zeros(1, *several.shape[1:]), several]).to(self.knowledge.device)
        if self.standardise and not self.deviation.any():
            told = several[several.ne(0).any(-1)]
            if len(told) > 1:
                self.mean.copy_(told.mean(0))
                self.deviation.copy_(told.std(0).clamp(min=SMALLEST_DEVIATION))

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        vectors = self._read(self._stored(items) if knowledge is None else knowledge)
        vectors = nn.functional.dropout(vectors, self.dropout, self.training)
        ids = self.ids(items)
        if self.training and self.id_dropout:
            # Not scaled up: an item without its ID is what a new item looks like.
            ids = ids * (torch.rand(items.shape, device=ids.device) >= self.id_dropout)[..., None]
        return self.fuse(torch.cat([ids, vectors], dim=-1))

    def table(self) -> Tensor:
        if not self.on_target:
            return self.ids.weight
        return self.fuse(torch.cat([self.ids.weight, self._read(self.knowledge)], dim=-1))

    def encode(self, texts: Tensor) -> Tensor:
        """[U, K] vectors of texts that are not stored; here they come as vectors."""
        return texts

    def _stored(self, items: Tensor) -> Tensor:
        if self.draws is None or not self.training:
            return self.knowledge[items]
        return self.draws[items, torch.randint(self.draws.shape[1], items.shape, device=items.device)]

    def _read(self, vectors: Tensor) -> Tensor:
        """The vectors [..., K] as ``fuse`` gets them."""
        if not self.standardise:
            return vectors
        scaled = (vectors - self.mean) / self.deviation.clamp(min=SMALLEST_DEVIATION)
        return scaled * vectors.ne(0).any(-1, keepdim=True)

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "knowledge_dim": self.knowledge_dim,
            "on_target": self.on_target,
            "dropout": self.dropout,
            "standardise": self.standardise,
            "id_dropout": self.id_dropout,
        }


ITEM_ENCODERS: dict[str, type[ItemEncoder]] = {
    cls.kind: cls for cls in (IDTable, VectorTable, IDPlusVectors, KnowledgeConcat)
}


def build(kind: str, settings: dict[str, Any]) -> ItemEncoder:
    """An empty item encoder of ``kind``: one of these, or one that an installed package offers by an entry point.

    Raises:
        UserError: if there is none of that name.
    """
    if kind in ITEM_ENCODERS:
        return ITEM_ENCODERS[kind](**settings)
    offered = entry_points(group=ENTRY_POINTS, name=kind)
    if not offered:
        raise UserError(f"no item encoder is called {kind!r}, and no installed package offers it ({ENTRY_POINTS})")
    return next(iter(offered)).load()(**settings)


def _new_ids(n_items: int, dim: int) -> nn.Embedding:
    ids = nn.Embedding(n_items + 1, dim, padding_idx=0)
    nn.init.normal_(ids.weight, std=ID_STD)
    with torch.no_grad():
        ids.weight[0].zero_()
    return ids


def _new_projection(vector_dim: int, dim: int, wanted: bool) -> nn.Linear | None:
    if not wanted and vector_dim != dim:
        raise ValueError(f"vectors of width {vector_dim} for a recommender of width {dim}: they need a projection")
    if not wanted:
        return None
    projection = nn.Linear(vector_dim, dim, bias=False)  # without bias, padding stays zero
    nn.init.normal_(projection.weight, std=vector_dim**-0.5)
    return projection


def _project(vectors: Tensor, projection: nn.Linear | None) -> Tensor:
    return vectors if projection is None else projection(vectors)


def _refuse(knowledge: Tensor | None, what: str) -> None:
    if knowledge is not None:
        raise ValueError(f"{what} reads no knowledge")


def _check(vectors: Tensor, n_items: int, dim: int, what: str) -> None:
    if vectors.shape != (n_items, dim):
        raise ValueError(f"{what} are {tuple(vectors.shape)}, not ({n_items}, {dim})")
    if not torch.isfinite(vectors).all():
        raise ValueError(f"{what} are not all finite")
