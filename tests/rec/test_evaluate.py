"""``recalign evaluate`` on finished runs: figures and ranks on disk, several protocols, comparisons."""

import json
import shutil
import sys

import pytest
from pyarrow import parquet

from launch import cli
from rec import evaluate as module
from rec.evaluate import compare_runs, evaluate_run
from rec.job import open_run
from rec.protocol import Protocol, preset


@pytest.fixture
def recalign(monkeypatch, capsys):
    """Runs the command in this process, and gives what it printed."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["recalign", *map(str, arguments)])
        cli.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def own_run(finished_run, tmp_path):
    """A copy of a finished run that a test may write into."""

    def copy(name: str, called: str):
        return shutil.copytree(finished_run(name), tmp_path / called)

    return copy


def test_several_protocols_leave_ranks_figures_and_a_result(recalign, own_run):
    path = own_run("SASRec", "one")
    before = (path / "result.json").read_bytes()
    said = recalign("evaluate", path, "--protocol", "elephant-full, gsasrec")
    assert "seen items left out" in said
    folder, run = path / "evaluations", open_run(path)
    for name in ("elephant-full", "gsasrec"):
        content = json.loads((folder / f"{name}-test.json").read_text())
        assert content["protocol"] == preset(name).of_run(run.data, "train").described()
        table = parquet.read_table(folder / f"{name}-test.parquet")
        assert table.column_names == ["user_id", "item_id", "rank"]
        hits = [rank <= 10 for rank in table["rank"].to_pylist()]
        assert content["metrics"]["HR@10"] == pytest.approx(sum(hits) / len(hits))
        assert table["user_id"].to_pylist() == run.data.user_ids
        targets = [run.data.items["item_id"][item - 1].as_py() for item in run.data.targets("test").tolist()]
        assert table["item_id"].to_pylist() == targets
    result = json.loads((folder / "result.json").read_text())
    assert [row["protocol"] for row in result["rows"]] == ["elephant-full", "gsasrec"]
    assert result["command"].startswith("recalign evaluate")
    assert [row["protocol_hash"] for row in result["rows"]] == [
        result["protocol"][name]["hash"] for name in ("elephant-full", "gsasrec")
    ]
    assert (path / "result.json").read_bytes() == before


def test_the_recipes_own_protocol_gives_the_figures_of_training(recalign, own_run):
    path = own_run("SASRec", "one")
    recalign("evaluate", path)
    (row,) = json.loads((path / "evaluations" / "result.json").read_text())["rows"]
    trained = json.loads((path / "result.json").read_text())["rows"][1]
    assert row["NDCG@10"] == trained["NDCG@10"]
    assert row["protocol_hash"] == trained["protocol_hash"]


def test_two_runs_are_compared(recalign, own_run):
    one, other = own_run("SASRec", "one"), own_run("GRU4Rec", "other")
    said = recalign("evaluate", one, "--against", other, "--protocol", "strict")
    assert "strict: 40 instances of both" in said
    [folder] = (one / "evaluations").glob("against-other-*")
    result = json.loads((folder / "result.json").read_text())
    by_metric = {row["metric"]: row for row in result["rows"]}
    figures = [evaluate_run(open_run(path), {"strict": preset("strict")})["strict"]["HR@10"] for path in (one, other)]
    assert by_metric["HR@10"]["difference"] == pytest.approx(figures[0] - figures[1])
    assert 0 < by_metric["HR@10"]["p"] <= 1


def test_runs_that_drop_other_cold_targets_share_the_rest(own_run, monkeypatch):
    """One was trained on the validation items too: fewer of its targets are cold."""
    one, other = (open_run(own_run("SASRec", name)) for name in ("one", "other"))
    ranked = module.rank_run
    monkeypatch.setattr(module, "rank_run", lambda run, *more: {
        name: metrics.of(metrics.instances > (3 if run is one else 0)) for name, metrics in ranked(run, *more).items()
    })  # fmt: skip
    found = compare_runs(one, other, {"own": Protocol(cold_targets="drop")})["own"]
    assert (found["instances"], found["left_out"]) == (36, 3)
    assert found["metrics"]["HR@10"]["difference"] == 0
