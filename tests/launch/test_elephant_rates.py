"""How the Elephant's study chooses a learning rate and a deviation."""

import json

import pytest
import torch

from launch.elephant import rates
from launch.elephant.rates import choose, climb, load_chosen
from rec.config import RecConfig
from rec.items import save_vectors
from rec.runtime.config import build
from rec.runtime.runfolder import RunFolder

RATES = [3e-4, 1e-3, 3e-3, 1e-2]


@pytest.mark.parametrize(
    ("worth", "tried"),
    [
        ([1, 2, 3, 4], [1, 2, 3]),
        ([4, 3, 2, 1], [1, 2, 0]),
        ([1, 3, 2, 1], [1, 2, 0]),
        ([1, 2, 3, 1], [1, 2, 3]),
        ([0, 0, 0, 0], [1, 2, 0]),
        ([1, 0, 0, 0], [1, 2, 0]),
        ([1, 2, 0, 9], [1, 2, 0]),
        ([7], [0]),
        ([7, 8], [0, 1]),
        ([1, 2, 3, 4, 5, 6, 7], [3, 4, 5, 6]),
    ],
)
def test_the_search_climbs_from_the_middle_and_stops_after_the_top(worth, tried):
    values = [float(place) for place in range(len(worth))]
    found = climb(values[::-1], lambda value: float(worth[int(value)]))
    assert list(found.items()) == [(float(place), worth[place]) for place in tried]


@pytest.mark.parametrize(
    ("start", "worth", "tried"),
    [
        (0, [3, 4, 2, 1], [0, 1, 2]),
        (1, [4, 3, 2, 1], [1, 2, 0]),
        (3, [4, 3, 2, 1], [3, 2, 1, 0]),
        (3, [1, 2, 3, 4], [3, 2]),
    ],
)
def test_the_search_can_begin_anywhere(start, worth, tried):
    assert list(climb(range(len(worth)), worth.__getitem__, start)) == tried


@pytest.fixture
def rec(small_data, tmp_path):
    torch.manual_seed(0)
    ids = small_data.items["item_id"].to_pylist()
    save_vectors(tmp_path / "vectors", ids, torch.randn(len(ids), 16), {})
    return build(
        RecConfig,
        {
            "model": {"dim": 16, "blocks": 1, "max_length": 8},
            "items": {"kind": "vectors", "file": str(tmp_path / "vectors"), "std": 0.02},
            "train": {"epochs": 3, "batch_size": 16},
        },
    )


@pytest.mark.parametrize("epochs", [2, None])
def test_what_validation_says_best_is_chosen_and_kept_with_all_figures(rec, small_data, tmp_path, epochs):
    folder = tmp_path / "chosen"
    choose(rec, str(small_data.folder), folder, RATES, [0.02, None], epochs)
    found = json.loads((folder / "chosen.json").read_text())
    worth = {(lr, std): value for lr, std, value in found["tried"]}
    at_first = {lr: value for (lr, std), value in worth.items() if std == 0.02}
    assert {1e-3, 3e-3} < set(at_first) < set(RATES)
    settings = max(worth, key=worth.get)
    assert (found["lrs"][0], found["std"]) == settings
    assert sorted(found["lrs"]) == RATES
    order = [worth.get((lr, settings[1]), -1) for lr in found["lrs"]]
    assert order == sorted(order, reverse=True)
    for (lr, std), value in worth.items():
        name = f"lr={lr}" if std == 0.02 else f"lr={lr}-std={std}"
        trained = [row["NDCG@10"] for row in RunFolder(folder / name).events("epoch")]
        best = json.loads((folder / name / "finished.json").read_text())["valid_NDCG@10"]
        assert value == (trained[-1] if epochs else best)
        assert len(trained) == (epochs or 3)
    assert load_chosen(folder) == (found["lrs"], found["std"])
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    choose(rec, str(small_data.folder), folder, RATES, [0.02, None], epochs)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_of_rates_that_are_worth_the_same_one_is_chosen_for_the_deviation_and_the_cells(
    rec, small_data, tmp_path, monkeypatch
):
    judged = []
    monkeypatch.setattr(rates, "_valid", lambda own, *_, **__: judged.append((own.train.lr, own.items.std)) or 0.02)
    choose(rec, str(small_data.folder), tmp_path / "tie", RATES, [0.02, None])
    assert judged == [(1e-3, 0.02), (3e-3, 0.02), (3e-4, 0.02), (1e-3, None)]
    assert load_chosen(tmp_path / "tie").lrs[0] == 1e-3


def test_a_deviation_that_is_better_has_a_rate_of_its_own(rec, small_data, tmp_path, monkeypatch):
    worth = {(3e-4, 0.02): 5, (1e-3, 0.02): 4, (3e-3, 0.02): 3, (3e-4, None): 6, (1e-3, None): 8, (3e-3, None): 7}
    judged = []

    def judge(own, data, run, at_end):
        judged.append((own.train.lr, own.items.std))
        return worth[judged[-1]] / 10

    monkeypatch.setattr(rates, "_valid", judge)
    choose(rec, str(small_data.folder), tmp_path / "own", RATES, [0.02, None])
    assert judged == [(1e-3, 0.02), (3e-3, 0.02), (3e-4, 0.02), (3e-4, None), (1e-3, None), (3e-3, None)]
    assert load_chosen(tmp_path / "own") == ([1e-3, 3e-3, 3e-4, 1e-2], None)


def test_rates_that_diverge_are_worth_nothing(rec, small_data, tmp_path):
    choose(rec, str(small_data.folder), tmp_path / "some", [1e-3, 1e30], [0.02])
    assert load_chosen(tmp_path / "some").lrs == [1e-3, 1e30]
    choose(rec, str(small_data.folder), tmp_path / "all", [1e29, 1e30], [0.02, None])
    assert load_chosen(tmp_path / "all") == ([], 0.02)


def test_one_rate_and_one_deviation_leave_nothing_to_train(rec, small_data, tmp_path):
    choose(rec, str(small_data.folder), tmp_path / "one", [1e-3], [0.05])
    assert load_chosen(tmp_path / "one") == ([1e-3], 0.05)
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["chosen.json"]
