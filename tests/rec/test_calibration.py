"""A temperature that makes likelihoods mean something, against a search by small steps."""

import pytest
import torch

from rec.calibration import TEMPERATURES, fit_temperature
from rec.data.prepared import Prepared
from rec.models.base import SequenceRecommender


@pytest.fixture
def model(finished_run) -> SequenceRecommender:
    return SequenceRecommender.from_pretrained(finished_run("SASRec") / "model")


def log_likelihood(model: SequenceRecommender, data: Prepared, temperature: float) -> float:
    rows = range(data.n_users)
    items, lengths = data.histories("valid", rows, 8)
    with torch.no_grad():
        return float(model.log_likelihood(items, lengths, data.targets("valid"), temperature=temperature).sum())


def test_the_likeliest_temperature_of_the_grid(model, small_data):
    found = fit_temperature(model, small_data)
    assert found == max(TEMPERATURES, key=lambda value: log_likelihood(model, small_data, value))
    finer = [1.01**step for step in range(-140, 349)]
    best = max(finer, key=lambda value: log_likelihood(model, small_data, value))
    assert TEMPERATURES[0] < found < TEMPERATURES[-1]
    assert found == pytest.approx(best, rel=0.2)


def test_scores_that_are_too_large_by_a_factor_ask_for_that_temperature(model, small_data):
    before = fit_temperature(model, small_data)
    scores = model.scores
    model.scores = lambda states, out=None: 4 * scores(states)
    assert fit_temperature(model, small_data) == pytest.approx(4 * before)


def test_nothing_to_calibrate_by_changes_nothing(model, small_data):
    none = small_data.without(torch.ones(small_data.n_users, dtype=torch.bool))
    assert fit_temperature(model, none) == 1.0


def test_a_temperature_divides_the_scores(model, small_data):
    items, lengths = small_data.histories("valid", [0, 1, 2], 8)
    targets = small_data.targets("valid")[:3]
    for temperature in (0.5, 1.0, 3.0):
        scores = model.score_all(torch.arange(3), items, lengths) / temperature
        expected = [float(row[y - 1] - torch.log(row.exp().sum())) for row, y in zip(scores, targets, strict=True)]
        found = model.log_likelihood(items, lengths, targets, temperature=temperature)
        torch.testing.assert_close(found, torch.tensor(expected))
