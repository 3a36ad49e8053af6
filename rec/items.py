"""The ``rec.items`` section: which item encoder, and the file of vectors that it begins with."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rec.data.prepared import Prepared
from rec.item_encoder import IDPlusVectors, IDTable, ItemEncoder, KnowledgeConcat, VectorTable
from rec.runtime import files
from rec.runtime.config import Section, hash_of
from rec.runtime.errors import UserError


class IDItems(Section):
    """One trainable vector an item."""

    kind: Literal["id"] = "id"


class _FromVectors(Section):
    """What begins with a file of vectors, and how they get the model's width and scale."""

    file: Path
    """``item_vectors.safetensors``: a tensor ``vectors`` [N, K] and the ``item_ids`` that they belong to."""
    projection: bool = False
    """Learn a linear map from the file's width to the model's; this or ``pca`` is needed where they differ."""
    pca: bool = False
    """Begin with the first principal components of the catalog's vectors, as many as the model is wide (Harte et al.,
    RecSys 2023): the recommender is then what it is without vectors, and costs as much."""
    std: float | None = Field(None, gt=0)
    """Scale the vectors as a whole until they deviate by this much (root mean square) from their mean, which all items
    share and which tells nothing; models expect about 0.02. Null: as they are."""

    @model_validator(mode="after")
    def _one_way_to_another_width(self) -> Self:
        if self.pca and self.projection:
            raise ValueError("pca and projection both change the vectors' width: take one")
        return self


class VectorItems(_FromVectors):
    """A table that begins as the vectors of a file."""

    kind: Literal["vectors"] = "vectors"
    trainable: bool = True


class IDPlusVectorItems(_FromVectors):
    """A trainable ID vector plus the fixed vectors of a file."""

    kind: Literal["id+vectors"] = "id+vectors"


class KnowledgeItems(Section):
    """An ID vector concatenated with the knowledge vectors of a file."""

    kind: Literal["knowledge"] = "knowledge"
    file: Path
    on_target: bool = False
    """Whether scored candidates carry knowledge too."""
    dropout: float = Field(0.0, ge=0, lt=1)
    standardise: bool = False
    """Each entry of the vectors to mean 0 and variance 1 over the catalog."""
    id_dropout: float = Field(0.0, ge=0, le=1)
    """Share of the items of histories whose ID vector is left out while training: the recommender has to read."""


ItemsConfig = Annotated[IDItems | VectorItems | IDPlusVectorItems | KnowledgeItems, Field(discriminator="kind")]


def make_items(config: ItemsConfig, data: Prepared, dim: int) -> ItemEncoder:
    """The item encoder of width ``dim`` for ``data``.

    Raises:
        UserError: if the file of vectors does not fit the data or the model.
    """
    if isinstance(config, IDItems):
        return IDTable(data.n_items, dim)
    vectors = load_vectors(config.file, data)
    if isinstance(config, KnowledgeItems):
        options = config.on_target, config.dropout, config.standardise, config.id_dropout
        items = KnowledgeConcat(data.n_items, dim, vectors.shape[1], *options)
        items.set_knowledge(vectors)
        return items
    if config.pca:
        require_components(*vectors.shape, dim, str(config.file))
        vectors = principal_components(vectors, dim)
    if vectors.shape[1] != dim and not config.projection:
        raise UserError(
            f"{config.file} holds vectors of width {vectors.shape[1]}, the model's dim is {dim}: set"
            f" rec.model.dim={vectors.shape[1]}, or rec.items.projection=true to learn a map between them, or"
            " rec.items.pca=true to begin with their first principal components"
        )
    if config.std is not None:
        deviation = deviation_of(vectors)
        if deviation <= 1e-6 * vectors.abs().mean():
            raise UserError(f"{config.file}: the vectors of all items are the same: there is nothing to scale to std")
        vectors = vectors * (config.std / deviation)
    if isinstance(config, VectorItems):
        items = VectorTable(data.n_items, dim, vectors.shape[1], config.trainable, config.projection)
    else:
        items = IDPlusVectors(data.n_items, dim, vectors.shape[1], config.projection)
    items.set_vectors(vectors)
    return items


def require_components(count: int, width: int, dim: int, whose: str) -> None:
    """Raise a UserError if ``count`` vectors of ``width``, called ``whose``, have not ``dim`` principal components."""
    most = min(width, count - 1)
    if dim > most:
        raise UserError(
            f"{whose}: {count} vectors of width {width} have {most} principal components, the model's dim is {dim}:"
            " lower it, or take projection=true instead of pca"
        )


def principal_components(vectors: Tensor, dim: int) -> Tensor:
    """[N, dim]: vectors [N, K] less their mean, along the directions in which they vary most, the first one first.

    A direction's sign is chosen so that its largest entry is positive: the same vectors always give the same.
    """
    centred = vectors.double() - vectors.double().mean(0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :dim]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (centred @ (directions * largest.sign())).to(vectors.dtype)


def deviation_of(vectors: Tensor) -> Tensor:
    """How far vectors [N, K] are from their mean, root mean square of all entries."""
    return (vectors - vectors.mean(0)).square().mean().sqrt()


def save_vectors(path: Path, item_ids: list[str], vectors: Tensor, source: dict[str, str]) -> None:
    """Write item vectors [N, K] with the ids that they belong to and where they came from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.beside(path)
    metadata = {"item_ids": json.dumps(item_ids), "source": json.dumps(source)}
    save_file({"vectors": vectors.contiguous()}, temporary, metadata)
    files.fsync(temporary)
    temporary.replace(path)


def hash_of_vectors(path: Path) -> str:
    """Of what a file of vectors holds: its bytes differ from one writing to the next, for its header has no order.

    Raises:
        UserError: if the file cannot be read.
    """
    item_ids, vectors = _read(path)
    return hash_of([item_ids, hashlib.sha256(vectors.contiguous().numpy().tobytes()).hexdigest()])


def _read(path: Path) -> tuple[list[str], Tensor]:
    """Item ids [N] and their vectors [N, K] in float32."""
    try:
        with safe_open(path, framework="pt") as stored:
            metadata, vectors = stored.metadata() or {}, stored.get_tensor("vectors").float()
            item_ids = json.loads(metadata["item_ids"])
    except FileNotFoundError:
        raise UserError(f"item vectors not found: {path}") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{path} holds no item vectors: {' '.join(str(error).split())}") from None
    if not isinstance(item_ids, list) or not all(isinstance(item, str) for item in item_ids):
        raise UserError(f"{path}: item_ids must be a JSON list of texts")
    if vectors.dim() != 2 or len(item_ids) != len(vectors):
        raise UserError(f"{path}: {len(item_ids)} item ids for vectors of shape {tuple(vectors.shape)}")
    return item_ids, vectors


def load_vectors(path: Path, data: Prepared) -> Tensor:
    """[N, K] float32 vectors of the data's items in their order; the file may hold more items.

    Raises:
        UserError: if the file cannot be read, names an item twice or not at all, or holds values not finite.
    """
    item_ids, vectors = _read(path)
    row_of = {item: row for row, item in enumerate(item_ids)}
    if len(row_of) < len(item_ids):
        twice = next(item for row, item in enumerate(item_ids) if row_of[item] != row)
        raise UserError(f"{path} holds item {twice!r} twice")
    wanted = data.items["item_id"].to_pylist()
    missing = [item for item in wanted if item not in row_of]
    if missing:
        raise UserError(
            f"{path} has no vector for {len(missing)} of {len(wanted)} items of {data.folder}, e.g. {missing[0]!r}:"
            " make the vectors from this folder"
        )
    vectors = vectors[torch.tensor([row_of[item] for item in wanted])]
    bad = (~torch.isfinite(vectors)).any(dim=1).nonzero()
    if len(bad):
        item = wanted[int(bad[0])]
        raise UserError(
            f"{path}: row {row_of[item]}, the vector of item {item!r}, holds a value that is not finite: make it again"
        )
    return vectors
