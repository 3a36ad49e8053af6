"""Training that starts from a finished run, on the items' vectors alone or without them (Elephant, further-train)."""

from pathlib import Path

import pytest
import torch

from rec.build import build_model
from rec.config import RecConfig
from rec.items import save_vectors
from rec.job import RecJob
from rec.models.base import Recommender
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.train import run

MODEL = {"dim": 16, "heads": 2, "blocks": 1, "max_length": 8, "dropout": 0.0}


@pytest.fixture(scope="module")
def vectors(small_data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "item_vectors.safetensors"
    made = 0.1 * torch.randn(small_data.n_items, 16, generator=torch.Generator().manual_seed(0))
    save_vectors(path, small_data.items["item_id"].to_pylist(), made, {"kind": "random"})
    return path


@pytest.fixture(scope="module")
def job(small_data, vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("further")

    def make(name: str, trainable: bool, model: str = "SASRec", **train: object) -> RecJob:
        items = {"kind": "vectors", "file": str(vectors), "trainable": trainable}
        settings = {"lr": 5e-3, "batch_size": 16, "epochs": 3, **train}
        rec = {"model": {**MODEL, "name": model}, "items": items, "train": settings, "evaluate": {"cutoffs": [10]}}
        return build(RecJob, {"data": str(small_data.folder), "run": str(folder / name), "rec": rec})

    return make


@pytest.fixture(scope="module")
def frozen(job) -> Path:
    own = job("frozen", trainable=False)
    run(own, "test")
    return own.run


@pytest.mark.parametrize(("tune", "moved"), [("all", {"items", "model"}), ("items", {"items"}), ("model", {"model"})])
def test_what_is_tuned_moves_and_nothing_else_does(job, frozen, small_data, tune, moved):
    start = Recommender.from_pretrained(frozen / "model").state_dict()
    own = job(f"further-{tune}", trainable=True, start=str(frozen), tune=tune)
    model = build_model(own.rec, small_data)
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]), name
    found = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {"items" if name.startswith("items.") else "model" for name in found} == moved
    result = run(own, "test")
    assert result["training"]["valid_NDCG@10"] >= _valid(frozen)
    after = Recommender.from_pretrained(own.run / "model").state_dict()
    changed = {name for name in after if not torch.equal(after[name], start[name])}
    assert {"items" if name.startswith("items.") else "model" for name in changed} == moved


def _valid(folder: Path) -> float:
    from rec.runtime import files

    return files.read_json(folder / "finished.json")["valid_NDCG@10"]


def test_what_cannot_be_started_from_is_one_clear_line(job, frozen, small_data, tmp_path):
    with pytest.raises(UserError, match="no finished recommender"):
        build_model(job("a", trainable=True, start=str(tmp_path)).rec, small_data)
    with pytest.raises(UserError, match="another kind of model or items"):
        build_model(job("b", trainable=True, model="BERT4Rec", start=str(frozen)).rec, small_data)
    other_heads = job("d", trainable=True, start=str(frozen)).rec
    other_heads = other_heads.model_copy(update={"model": other_heads.model.model_copy(update={"heads": 1})})
    with pytest.raises(UserError, match="another kind of model or items: its heads is 2, not 1"):
        build_model(other_heads, small_data)
    with pytest.raises(UserError, match="tune=items leaves nothing to train"):
        build_model(job("c", trainable=False, start=str(frozen), tune="items").rec, small_data)


def test_a_start_that_saw_the_validation_items_is_refused_where_they_are_to_stop_by(job, small_data):
    own = job("saw-all", trainable=False, on="train+valid", epochs=1)
    run(own, "test")
    with pytest.raises(UserError, match=r"was trained on the validation items.*set train.on=train\+valid"):
        build_model(job("e", trainable=True, start=str(own.run)).rec, small_data)
    build_model(job("f", trainable=True, start=str(own.run), on="train+valid").rec, small_data)


def test_fixed_vectors_are_those_of_the_recipes_file(job, small_data, vectors, tmp_path):
    first = job("id-and-vectors", trainable=True)
    items = {"kind": "id+vectors", "file": str(vectors)}
    first = build(RecJob, first.model_dump() | {"rec": first.rec.model_dump() | {"items": items}})
    run(first, "test")
    content = first.rec.model_dump()
    content["train"] |= {"start": str(first.run)}
    build_model(build(RecConfig, content), small_data)
    other = tmp_path / "other.safetensors"
    save_vectors(other, small_data.items["item_id"].to_pylist(), torch.ones(small_data.n_items, 16), {})
    content["items"] |= {"file": str(other)}
    with pytest.raises(UserError, match=r"has other items.vectors than this recipe gives it"):
        build_model(build(RecConfig, content), small_data)
