"""The peers' half of ``recalign bench rec``: their environments, and adapters that judge them by our rules."""

import importlib.util
import json
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from torch import nn

from launch.bench import peers
from rec.config import EvaluateConfig
from rec.data.prepared import Prepared
from rec.evaluation import evaluate
from rec.models.base import Recommender
from rec.models.sasrec import SASRecConfig
from rec.runtime.errors import UserError


def load_common():
    specification = importlib.util.spec_from_file_location("adapter_common", peers.ADAPTERS / "common.py")
    module = sys.modules["adapter_common"] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


common = load_common()


@pytest.fixture
def folder(tmp_path) -> Path:
    """40 users with 3 to 12 interactions on 30 items, as a prepared folder has them."""
    generator = np.random.default_rng(0)
    users = np.repeat(np.arange(40), generator.integers(3, 13, 40)).astype(np.int32)
    items = generator.integers(1, 31, len(users)).astype(np.int32)
    items[:30] = np.arange(1, 31)
    parquet.write_table(pa.table({"user": users, "item": items}), tmp_path / "interactions.parquet")
    return tmp_path


def fake_environment(root: Path, name: str, script: str) -> None:
    """An environment whose Python is a shell script."""
    python = root / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    (root / name / peers.READY).write_text("\n".join(peers.PEERS[name].requirements) + "\n")


def test_a_missing_environment_is_one_line_that_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"--setup replay --root .*$") as caught:
        peers.run("replay", "sasrec", [], tmp_path)
    assert "\n" not in str(caught.value)


def test_an_environment_of_other_requirements_is_not_ready(tmp_path):
    fake_environment(tmp_path, "replay", "true")
    assert peers.is_ready("replay", tmp_path)
    (tmp_path / "replay" / peers.READY).write_text("replay-rec==0.21\n")
    assert not peers.is_ready("replay", tmp_path)


def test_an_unknown_peer_is_named(tmp_path):
    with pytest.raises(UserError, match="unknown peer 'elliot'; there are: recbole"):
        peers.setup(["elliot"], tmp_path)


def test_the_last_line_is_the_result_and_our_environment_stays_out(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    fake_environment(
        tmp_path,
        "replay",
        """echo chatter; echo "{\\"path\\": \\"$PYTHONPATH\\", \\"spin\\": \\"$GOMP_SPINCOUNT\\"}" """,
    )
    assert peers.run("replay", "sasrec", [], tmp_path) == {"path": "", "spin": "10000"}


def test_a_failure_shows_the_last_thing_that_was_said(tmp_path):
    fake_environment(tmp_path, "replay", "echo Traceback >&2; echo 'ValueError: no' >&2; exit 3")
    with pytest.raises(UserError, match=r"failed \(exit code 3\): ValueError: no$"):
        peers.run("replay", "sasrec", [], tmp_path)


def test_a_hanging_adapter_is_ended(tmp_path):
    fake_environment(tmp_path, "replay", "exec sleep 60")
    with pytest.raises(UserError, match=r"did not end within 0\.2 s"):
        peers.run("replay", "sasrec", [], tmp_path, timeout_s=0.2)


class ByLastItem(Recommender):
    """Scores are a row of a matrix with ties, chosen by the last item of the history."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__(SASRecConfig(), None)
        self.matrix = nn.Parameter(matrix)

    def score_all(self, users, items, lengths):
        return self.matrix[items.gather(1, lengths[:, None] - 1)[:, 0]]


@pytest.mark.parametrize("seen", ["rank", "mask"])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_peers_are_ranked_as_we_are(folder, split, seen):
    matrix = torch.randint(0, 12, (31, 30), generator=torch.Generator().manual_seed(1)).float()
    theirs = common.Sequences.load(folder)
    found = common.evaluate(
        lambda rows: matrix[rows[:, -1]], theirs, split, Namespace(max_length=50, seen=seen), batch=7
    )
    items = pa.table({"item_id": list(map(str, range(30)))})
    data = Prepared(folder, {}, items, torch.from_numpy(theirs.items), torch.from_numpy(theirs.offsets))
    expected = evaluate(ByLastItem(matrix), data, split, EvaluateConfig(seen=seen)).summary()
    assert found["HR@10"] > 0
    assert found == {name: pytest.approx(expected[name]) for name in ("HR@10", "NDCG@10")}


def test_training_windows_end_before_the_held_out_items(folder):
    data = common.Sequences.load(folder)
    assert data.is_leave_one_out
    windows = data.training_windows(4)
    trainable = [user for user in range(40) if data.offsets[user + 1] - data.offsets[user] >= 4]
    assert len(windows) == len(trainable)
    for row, user in zip(windows, trainable, strict=True):
        expected = data.items[data.offsets[user] : data.offsets[user + 1] - 2][-4:]
        assert row.tolist() == [0] * (4 - len(expected)) + expected.tolist()


def test_items_that_a_peer_does_not_know_leave_no_gap_and_have_no_score():
    mapping = common.numbering([5, 2], 5)
    assert mapping.tolist() == [0, 0, 2, 0, 0, 1]
    assert common.renumber(torch.tensor([[0, 5, 3, 2]]), mapping).tolist() == [[0, 0, 1, 2]]
    scores = common.in_catalog_order(torch.tensor([[0.5, 0.2]]), mapping)
    assert scores.tolist() == [[float("-inf"), pytest.approx(0.2), float("-inf"), float("-inf"), 0.5]]


def test_the_stopwatch_leaves_the_warm_up_out_and_times_three_batches_at_least():
    stopwatch = common.Stopwatch(0)
    assert len(list(stopwatch.watch(range(100)))) == common.WARMUP_BATCHES + common.LEAST_BATCHES
    figures = stopwatch.figures(10)
    assert figures["batches_timed"] == common.LEAST_BATCHES
    assert figures["seconds_per_epoch"] == pytest.approx(figures["seconds_per_batch"] * 10)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("recbole", []),
        ("rectools", []),
        ("rectools", ["--loss", "fast-ce"]),
        ("replay", []),
        ("replay", ["--loss", "sampled", "--precision", "bf16"]),
    ],
)
def test_a_peer_trains_and_is_evaluated(folder, tmp_path, name, options):
    if not peers.is_ready(name):
        pytest.skip(f"no environment for {peers.PEERS[name].title}: python -m launch.bench.peers --setup {name}")
    if "sampled" in options:
        # 256 negatives need a larger catalog.
        parquet.write_table(pa.table({"item_id": list(map(str, range(300)))}), folder / "items.parquet")
    arguments = ["--data", str(folder), "--max-length", "8", "--batch-size", "16", "--epochs", "1", "--evaluate"]
    found = peers.run(name, "sasrec", [*arguments, *options, "--out", str(tmp_path / "result.json")])
    assert found == json.loads((tmp_path / "result.json").read_text())
    assert found["best_epoch"] == 1
    assert set(found["test"]) == {"HR@10", "NDCG@10"}
    assert found["train_seconds"] > 0
