"""RecBole's evaluator and ours, on the same scores. Its figures: ``python -m launch.bench.peers --record-metrics``."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from rec.data.prepared import Prepared
from rec.evaluation import evaluate_many
from rec.models.base import Recommender
from rec.models.sasrec import SASRecConfig
from rec.protocol import PRESETS

RECORDED = json.loads((Path(__file__).parent / "data" / "recbole_metrics.json").read_text())


class GivenScores(Recommender):
    """Answers with a row of a matrix for every user."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__(SASRecConfig(), None)
        self.given = nn.Parameter(scores)

    def score_all(self, users, items, lengths):
        return self.given[users]


def make_case(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The matrix that the figures were recorded on, by the recipe that the file holds."""
    generator = np.random.Generator(np.random.PCG64(RECORDED["seed"]))
    scores = generator.standard_normal((300, 97)).astype(np.float32)
    positives = generator.integers(0, 97, 300)
    scores[np.arange(300), positives] += 1
    if name == "ties":
        scores = np.clip(np.round(scores), -4, 4)
    if name == "masked":
        history = generator.random((300, 97)) < 0.1
        history[np.arange(300), positives] = False
        scores[history] = -np.inf
    return scores, positives


def ours(name: str, ties: str) -> dict[str, float]:
    scores, positives = make_case(name)
    sequence = np.stack([np.ones(300), np.full(300, 2), positives + 1], axis=1).astype(np.int64).ravel()
    items = pa.table({"item_id": list(map(str, range(97)))})
    data = Prepared(Path("made-up"), {}, items, torch.from_numpy(sequence), torch.arange(0, 901, 3))
    protocol = PRESETS["recbole"].model_copy(update={"ties": ties, "cutoffs": tuple(RECORDED["cutoffs"])})
    return evaluate_many(GivenScores(torch.from_numpy(scores)), data, "test", {"": protocol}, 64)[""].summary()


@pytest.mark.parametrize("name", list(RECORDED["cases"]))
def test_the_matrix_is_the_one_that_was_recorded(name):
    scores, positives = make_case(name)
    finite = scores[np.isfinite(scores)].astype(np.float64)
    case = RECORDED["cases"][name]
    assert (len(finite), int(positives.sum())) == (case["finite_scores"], case["sum_of_positives"])
    assert finite.sum() == pytest.approx(case["sum_of_finite_scores"])


@pytest.mark.parametrize("name", ["distinct", "masked"])
def test_figures_are_recboles(name):
    found, theirs = ours(name, "mean"), RECORDED["cases"][name]["metrics"]
    for k in RECORDED["cutoffs"]:
        assert found[f"HR@{k}"] == pytest.approx(theirs[f"hit@{k}"], abs=1e-9)
        assert found[f"HR@{k}"] == pytest.approx(theirs[f"recall@{k}"], abs=1e-9)
        assert found[f"NDCG@{k}"] == pytest.approx(theirs[f"ndcg@{k}"], abs=1e-9)
        assert found[f"MRR@{k}"] == pytest.approx(theirs[f"mrr@{k}"], abs=1e-9)


def test_with_ties_recbole_lies_between_the_worst_and_the_best_order():
    worst, best, theirs = ours("ties", "pessimistic"), ours("ties", "optimistic"), RECORDED["cases"]["ties"]["metrics"]
    for k in RECORDED["cutoffs"]:
        for name, their in (("HR", "hit"), ("NDCG", "ndcg"), ("MRR", "mrr")):
            assert worst[f"{name}@{k}"] <= theirs[f"{their}@{k}"] + 1e-9
            assert theirs[f"{their}@{k}"] <= best[f"{name}@{k}"] + 1e-9
    assert worst["HR@10"] < best["HR@10"]
