"""Exported files answer as the model does, in the runtimes that will serve them, and a check that would notice."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file
from torch import Tensor

from rec import export
from rec.ann import write_index
from rec.catalog import Catalog
from rec.export import Parity, check_packages, check_table, check_tower, export_run, load_tower, save_tower, trace
from rec.item_encoder import KnowledgeConcat
from rec.items import load_vectors
from rec.job import FinishedRun, open_run
from rec.models import MODELS
from rec.models.base import SequenceRecommender
from rec.models.sasrec import SASRec, SASRecConfig
from rec.recommend import Request, recommend
from rec.runtime import files
from rec.runtime.errors import UserError

SEQUENCE_MODELS = [name for name, kind in MODELS.items() if issubclass(kind, SequenceRecommender)]


@pytest.fixture
def sasrec(finished_run) -> FinishedRun:
    return open_run(finished_run("SASRec"))


def assert_same_states(model: SequenceRecommender, path: Path) -> None:
    """Batches and lengths that the tower was not traced with, drawn anew; padding that no history needs."""
    tower, longest = load_tower(path), model.config.max_length
    torch.manual_seed(3)
    for size in (1, 2, 5, 33):
        for length in (1, 2, longest - 1, longest):
            lengths = torch.randint(1, length + 1, (size,))
            items = torch.randint(1, model.items.n_items + 1, (size, length))
            items = items * (torch.arange(length) < lengths[:, None])
            with torch.no_grad():
                wanted = model.last_states(items, lengths)
                torch.testing.assert_close(tower(items, lengths), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SEQUENCE_MODELS)
def test_every_sequence_model_gives_the_same_states_in_onnxruntime_and_as_a_program(finished_run, tmp_path, name):
    run = open_run(finished_run(name))
    model = run.model.requires_grad_(False)
    program, _ = trace(model)
    for path in (tmp_path / "tower.onnx", tmp_path / "tower.pt2"):
        save_tower(program, model.config.max_length, path)
        assert_same_states(model, path)
        assert check_tower(model, run.data, load_tower(path), model.items.table()[1:]).holds


def test_a_model_of_knowledge_and_of_one_item_histories(small_data, tmp_path):
    items = KnowledgeConcat(small_data.n_items, 16, 5, on_target=True)
    items.set_knowledge(torch.randn(small_data.n_items, 5))
    with torch.no_grad():
        items.fuse.weight[:, 16:].normal_()
    model = SASRec(SASRecConfig(dim=16, max_length=1), items).eval().requires_grad_(False)
    program, _ = trace(model)
    save_tower(program, 1, tmp_path / "tower.pt2")
    parity = check_tower(model, small_data, load_tower(tmp_path / "tower.pt2"), model.items.table()[1:])
    assert parity.holds
    assert not check_tower(model, small_data, load_tower(tmp_path / "tower.pt2"), items.ids.weight[1:]).holds


def answers(folder: Path, history: list[int], k: int) -> list[str]:
    """What a service would do: nothing of recalign but the files."""
    config = files.read_json(folder / "config.json")
    tower = load_tower(folder / config["tower"]["file"])
    items = torch.tensor([history[-config["max_length"] :]])
    scores = tower(items, torch.tensor([items.shape[1]])) @ load_file(folder / "items.safetensors")["vectors"].T
    ids = parquet.read_table(folder / "items.parquet")["item_id"].to_pylist()
    return [ids[row] for row in scores[0].topk(k).indices.tolist()]


def test_the_files_alone_recommend_what_the_run_does(sasrec, tmp_path):
    content = export_run(sasrec, "onnx", tmp_path / "deep" / "out", ann=True)
    folder = tmp_path / "deep" / "out"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "items.faiss", "items.parquet", "items.safetensors", "tower.onnx",
    ]  # fmt: skip
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    assert files.read_json(folder / "config.json") == content
    catalog = Catalog(sasrec.data)
    for history in ([4], [1, 2, 3], [*range(3, 17)]):
        wanted = recommend(sasrec, catalog, [Request(history)], 10, include_seen=True)[0]
        assert answers(folder, history, 10) == [item.item_id for item in wanted]
    parity = content["parity"]
    assert 0 <= parity["state"] <= 1e-5
    assert parity["same_lists"] == 1
    assert parity["histories"] > 100
    # The item table can begin another model: rec.items.file.
    assert torch.equal(load_vectors(folder / "items.safetensors", sasrec.data), sasrec.model.items.table()[1:])
    measured = content["index"]["measured"]
    assert measured[0]["name"] == "exact"
    assert measured[-1]["recall"] == 1  # of 30 items
    assert all(row["queries_per_s"] > 0 and row["one_query_ms"] > 0 for row in measured)
    # Again, in the other format: the earlier export makes way.
    export_run(sasrec, "torch", folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json", "items.parquet", "items.safetensors", "tower.pt2",
    ]  # fmt: skip
    assert answers(folder, [1, 2, 3], 5) == answers(folder, [1, 2, 3], 10)[:5]


class Biased(SASRec):
    """Scores that no inner product of state and item gives."""

    def scores(self, states: Tensor) -> Tensor:
        return super().scores(states) + torch.arange(self.items.n_items)


def test_an_export_that_answers_otherwise_is_refused_and_leaves_nothing(sasrec, tmp_path):
    biased = Biased(sasrec.model.config, sasrec.model.items)
    biased.load_state_dict(sasrec.model.state_dict())
    with pytest.raises(UserError, match=r"does not answer as the model does: states differ by .*, scores of the best"):
        export_run(replace(sasrec, model=biased), "torch", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_check_notices_every_kind_of_difference(sasrec):
    model, data, table = sasrec.model, sasrec.data, sasrec.model.items.table()[1:].detach()

    def holds(tower, items: Tensor = table) -> bool:
        return check_tower(model, data, tower, items).holds

    right = model.last_states
    assert holds(right)
    assert not holds(lambda items, lengths: right(items, lengths) * 1.001)
    assert not Parity(1, 1e-7, math.nan, 0.0).holds
    assert not Parity(1, math.nan, 1e-7, 1.0).holds
    assert not holds(lambda items, lengths: right(items, lengths) + 1e-3 * (lengths[:, None] == 8))
    assert not holds(lambda items, lengths: right(items, lengths) + 1e-3 * (len(lengths) == 1))
    # As a tower that reads the last place, padding or not.
    assert not holds(lambda items, lengths: right(items, torch.full_like(lengths, items.shape[1])))
    assert not holds(lambda items, lengths: right(items, lengths) * torch.nan)
    assert not holds(lambda items, lengths: right(items, lengths)[:, :8])
    assert not holds(right, table.roll(1, 0))
    assert not holds(right, table * 1.01)


def test_light_gcn_is_two_tables(finished_run, tmp_path):
    run = open_run(finished_run("LightGCN"))
    content = export_run(run, "onnx", tmp_path / "out", ann=True)
    assert "tower" not in content
    users, items = (load_file(tmp_path / "out" / f"{name}.safetensors")["vectors"] for name in ("users", "items"))
    ids = parquet.read_table(tmp_path / "out" / "users.parquet")["user_id"].to_pylist()
    number = ids.index("u5")
    catalog = Catalog(run.data)
    wanted = recommend(run, catalog, [Request([1], number)], 5, include_seen=True)[0]
    best = (users[number] @ items.T).topk(5).indices.tolist()
    assert [catalog.ids[row] for row in best] == [item.item_id for item in wanted]
    assert not check_table(run.model, run.data, users.roll(1, 0), items).holds


def test_a_ranker_has_no_states_to_export(finished_run, tmp_path):
    with pytest.raises(UserError, match=r"BST scores every candidate beside the history.*train one of SASRec, "):
        export_run(open_run(finished_run("BST")), "onnx", tmp_path / "out")


@pytest.mark.parametrize("content", ['{"format": "other"}', "no json", "[]", None])
def test_a_folder_of_something_else_is_left_alone(sasrec, tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    if content is not None:
        (tmp_path / "out" / "config.json").write_text(content)
    with pytest.raises(UserError, match="exists and is no earlier export; name another folder with --out"):
        export_run(sasrec, "torch", tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UserError, match="exists and is no earlier export"):
        export_run(sasrec, "torch", tmp_path / "out" / "thesis.txt")


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(sasrec, tmp_path):
    export_run(sasrec, "torch", tmp_path / "out")
    export_run(sasrec, "torch", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "out" / "app.py").write_text("serve()")
    with pytest.raises(UserError, match=r"holds more than an export \(app.py\)"):
        export_run(sasrec, "torch", tmp_path / "out")
    assert (tmp_path / "out" / "app.py").is_file()


def test_a_tower_whose_weights_lie_beside_it_is_replaced_too(sasrec, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "PROTOBUF_LIMIT", 2)
    export_run(sasrec, "onnx", tmp_path / "out")
    assert (tmp_path / "out" / "tower.onnx.data").is_file()
    monkeypatch.undo()
    export_run(sasrec, "onnx", tmp_path / "out")
    assert not (tmp_path / "out" / "tower.onnx.data").exists()


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("onnxruntime", "export to onnx needs onnxruntime: pip install onnx onnxscript onnxruntime"),
        ("faiss", "an index for approximate search needs faiss-cpu: pip install faiss-cpu"),
    ],
)
def test_a_missing_package_is_one_line_with_the_command(monkeypatch, module, message):
    check_packages("onnx", ann=True)
    monkeypatch.setitem(sys.modules, module, None)  # what Python itself takes for "not installed"
    with pytest.raises(UserError, match=f"^{message}$"):
        check_packages("onnx", ann=True)
    check_packages("torch", ann=False)


def gaussian(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, 8, generator=generator) for size in sizes]


def test_an_index_finds_what_it_says_it_finds(tmp_path):
    import faiss

    items, queries = gaussian(3000, 200)
    width, costs = write_index(items, queries, tmp_path / "items.faiss")
    index = faiss.read_index(str(tmp_path / "items.faiss"))
    assert index.hnsw.efSearch == width
    exact = (queries @ items.T).topk(10).indices
    found = index.search(queries.numpy(), 10)[1]
    hits = [len(set(one) & set(other.tolist())) for one, other in zip(found.tolist(), exact, strict=True)]
    assert sum(hits) / 2000 == pytest.approx(costs[-1].recall)
    assert costs[-1].recall >= 0.99
    assert [cost.recall for cost in costs[1:]] == sorted(cost.recall for cost in costs[1:])
