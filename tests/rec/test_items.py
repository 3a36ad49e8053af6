"""Item encoders from a file of vectors, and every way that such a file can be wrong."""

import json

import pytest
import torch
from safetensors.torch import save_file

from rec.config import RecConfig
from rec.items import load_vectors, make_items, save_vectors
from rec.runtime.config import build
from rec.runtime.errors import UserError


@pytest.fixture
def vectors(small_data, tmp_path):
    """A file of vectors in another order than the data's items, with one item too many."""
    torch.manual_seed(0)
    ids = [*reversed(small_data.items["item_id"].to_pylist()), "unknown"]
    values = torch.randn(len(ids), 6)
    save_vectors(tmp_path / "vectors.safetensors", ids, values, {"model": "test"})
    return tmp_path / "vectors.safetensors", dict(zip(ids, values, strict=True))


def items_of(small_data, dim: int = 6, **section):
    return make_items(build(RecConfig, {"items": section}).items, small_data, dim)


def test_vectors_come_in_the_order_of_the_data(small_data, vectors):
    path, by_id = vectors
    loaded = load_vectors(path, small_data)
    assert torch.equal(loaded, torch.stack([by_id[item] for item in small_data.items["item_id"].to_pylist()]))


@pytest.mark.parametrize("trainable", [True, False])
def test_a_table_begins_as_the_vectors(small_data, vectors, trainable):
    items = items_of(small_data, kind="vectors", file=str(vectors[0]), trainable=trainable)
    assert torch.equal(items.table()[1:], load_vectors(vectors[0], small_data))
    assert not items.table()[0].any()
    assert items.vectors.weight.requires_grad == trainable
    assert torch.equal(items(torch.tensor([[3, 0]])), items.table()[torch.tensor([[3, 0]])])


def test_ids_are_added_to_fixed_vectors(small_data, vectors):
    items = items_of(small_data, kind="id+vectors", file=str(vectors[0]))
    expected = items.ids.weight[1:] + load_vectors(vectors[0], small_data)
    torch.testing.assert_close(items.table()[1:], expected)
    assert [name for name, _ in items.named_parameters()] == ["ids.weight"]


def test_knowledge_vectors_come_from_a_file(small_data, vectors):
    items = items_of(small_data, 16, kind="knowledge", file=str(vectors[0]), on_target=True)
    assert torch.equal(items.knowledge[1:], load_vectors(vectors[0], small_data))
    assert items.on_target


def test_another_width_needs_a_projection(small_data, vectors):
    with pytest.raises(
        UserError, match=r"width 6, the model's dim is 16: set rec.model.dim=6, or .*projection=true .*pca=true"
    ):
        items_of(small_data, 16, kind="vectors", file=str(vectors[0]))
    items = items_of(small_data, 16, kind="vectors", file=str(vectors[0]), projection=True, trainable=False)
    assert items.table().shape == (small_data.n_items + 1, 16)
    assert not items.table()[0].any()
    assert [name for name, value in items.named_parameters() if value.requires_grad] == ["projection.weight"]


@pytest.mark.parametrize("kind", ["vectors", "id+vectors"])
def test_a_narrower_model_begins_with_principal_components(small_data, vectors, kind):
    values = load_vectors(vectors[0], small_data)
    items = items_of(small_data, 4, kind=kind, file=str(vectors[0]), pca=True)
    found = items.table()[1:].detach() - (items.ids.weight[1:].detach() if kind == "id+vectors" else 0)
    left, spread, _ = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    torch.testing.assert_close(found.abs(), (left * spread)[:, :4].abs(), atol=1e-5, rtol=1e-4)
    # What is kept is the best approximation of rank 4: what is lost is what the smaller singular values hold.
    axes = torch.linalg.lstsq(found, values - values.mean(0)).solution
    lost = (values - values.mean(0) - found @ axes).square().sum()
    torch.testing.assert_close(lost, spread[4:].square().sum(), atol=1e-4, rtol=1e-4)
    assert (axes.gather(1, axes.abs().argmax(1, keepdim=True)) > 0).all()
    assert [name for name, _ in items.named_parameters() if "projection" in name] == []


def test_components_are_scaled_and_refused_where_there_are_too_few(small_data, vectors):
    own = {"kind": "vectors", "file": str(vectors[0]), "pca": True}
    table = items_of(small_data, 4, **own, std=0.02).table()[1:]
    assert table.square().mean().sqrt().item() == pytest.approx(0.02)
    with pytest.raises(UserError, match=r"30 vectors of width 6 have 6 principal components, the model's dim is 16"):
        items_of(small_data, 16, **own)
    with pytest.raises(UserError, match="both change the vectors' width"):
        items_of(small_data, 4, **own, projection=True)


def test_vectors_are_scaled_by_how_far_they_are_from_their_mean(small_data, vectors, tmp_path):
    path, values = vectors[0], load_vectors(vectors[0], small_data)
    moved = tmp_path / "moved.safetensors"
    save_vectors(moved, small_data.items["item_id"].to_pylist(), 5 * values + 7, {})
    for own in (path, moved):
        table = items_of(small_data, kind="vectors", file=str(own), std=0.02).table()[1:]
        assert table.std(0, correction=0).square().mean().sqrt().item() == pytest.approx(0.02)
    ratios = table / (5 * values + 7)
    torch.testing.assert_close(ratios, ratios[:1, :1].expand_as(ratios))


def test_vectors_that_are_all_the_same_cannot_be_scaled(small_data, tmp_path):
    ids = small_data.items["item_id"].to_pylist()
    save_vectors(tmp_path / "same", ids, torch.full((len(ids), 6), 0.1), {})
    with pytest.raises(UserError, match="same: the vectors of all items are the same"):
        items_of(small_data, kind="vectors", file=str(tmp_path / "same"), std=0.02)


def test_a_missing_file_is_one_clear_line(small_data, tmp_path):
    with pytest.raises(UserError, match=r"item vectors not found: .*nowhere"):
        load_vectors(tmp_path / "nowhere.safetensors", small_data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids, values: (ids[1:], values[1:]), "has no vector for 1 of 30 items .*, e.g. 'i0'"),
        (lambda ids, values: ([ids[0], *ids[:-1]], values), "holds item 'i0' twice"),
        (lambda ids, values: (ids[1:], values), r"29 item ids for vectors of shape \(30, 6\)"),
        (
            lambda ids, values: (ids, values.index_fill(0, torch.tensor([4]), float("nan"))),
            "row 4, the vector of item 'i4', holds a value",
        ),
        (
            lambda ids, values: (ids, values.index_fill(0, torch.tensor([9]), float("inf"))),
            "row 9, the vector of item 'i9', holds a value",
        ),
    ],
)
def test_wrong_vectors_are_one_clear_line(small_data, tmp_path, change, message):
    ids, values = change(small_data.items["item_id"].to_pylist(), torch.randn(30, 6))
    save_vectors(tmp_path / "bad.safetensors", ids, values, {})
    with pytest.raises(UserError, match=message):
        load_vectors(tmp_path / "bad.safetensors", small_data)


def test_other_files_are_one_clear_line(small_data, tmp_path):
    (tmp_path / "text.safetensors").write_text("not tensors")
    save_file({"table": torch.zeros(3, 2)}, tmp_path / "other.safetensors", {"item_ids": json.dumps(["a"])})
    save_file({"vectors": torch.zeros(3, 2)}, tmp_path / "no-ids.safetensors")
    for name in ("text", "other", "no-ids"):
        with pytest.raises(UserError, match="holds no item vectors") as caught:
            load_vectors(tmp_path / f"{name}.safetensors", small_data)
        assert "\n" not in str(caught.value)
