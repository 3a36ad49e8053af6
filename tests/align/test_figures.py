"""What the log says of a step, by hand."""

import math

import pytest
import torch

from align.figures import (
    Arrivals,
    first_no_number,
    lag_figures,
    means,
    policy_figures,
    ratio_figures,
    reward_figures,
    saving_seconds,
    text_figures,
)
from align.samples import Sample, Text
from rec.runtime.runfolder import RunFolder


def test_the_lag_in_the_queue_begins_when_the_trainer_sees_the_batch():
    arrivals = Arrivals()
    assert arrivals.known_until(1) == 1
    arrivals.see(0, 2)  # batches 1 and 2 are there with batch 0
    assert arrivals.steps_in_queue(0) == 0
    assert (arrivals.known_until(1), arrivals.known_until(5)) == (3, 5)
    arrivals.see(1, 1)
    assert arrivals.steps_in_queue(1) == 1
    arrivals.see(2, 3)  # and now 3 to 5
    assert arrivals.steps_in_queue(2) == 2
    arrivals.see(3, 2)
    assert arrivals.steps_in_queue(3) == 1
    resumed = Arrivals()
    resumed.see(7, 1)  # what was before is not known
    assert resumed.steps_in_queue(7) is None
    resumed.see(8, 0)
    assert resumed.steps_in_queue(8) is None
    resumed.see(9, 1)
    assert resumed.steps_in_queue(9) == 0
    resumed.see(10, 0)
    assert resumed.steps_in_queue(10) == 1


def test_ratios_of_texts_and_draws_before_truncation():
    texts, draws = torch.tensor([0.5, 1.0, 4.0]).log(), torch.tensor([0.5, 4.0]).log()
    found = ratio_figures(texts, draws)
    assert found["importance_ratio"] == pytest.approx(5.5 / 3)
    assert found["importance_ratio_max"] == pytest.approx(4)
    assert found["effective_sample_fraction"] == pytest.approx(5.5**2 / (3 * (0.25 + 1 + 16)))
    assert found["draw_ratio_max"] == pytest.approx(4)
    assert found["draw_effective_fraction"] == pytest.approx(4.5**2 / (2 * 16.25))
    assert all(math.isfinite(value) for value in ratio_figures(torch.tensor([2000.0, 0]), draws).values())


def test_figures_of_the_policy_do_not_depend_on_how_texts_are_shared_out():
    numbers = torch.Generator().manual_seed(0)
    names = ("log_ratio", "logprob", "from_original", "mismatch", "tokens")
    texts = {name: torch.rand(7, generator=numbers, dtype=torch.float64) + 0.1 for name in names}
    draws = torch.rand(6, generator=numbers, dtype=torch.float64)
    whole = policy_figures([texts], [draws])
    parts = [{name: values[share] for name, values in texts.items()} for share in (slice(0, 2), slice(2, 7))]
    assert policy_figures(parts, draws.split([4, 2])) == pytest.approx(whole)
    ratios = texts["log_ratio"].exp()
    assert whole["kl"] == pytest.approx(float((ratios * texts["from_original"]).sum() / ratios.sum()))
    assert whole["mismatch_kl"] == pytest.approx(float(texts["mismatch"].sum() / texts["tokens"].sum()))
    assert whole["text_logprob"] == pytest.approx(float(texts["logprob"].mean()))


def test_lags_texts_rewards_and_means():
    def sample(version: int, *lengths: int) -> Sample:
        draws = [[Text(0, [1] * length, [0.0] * length, "x")] for length in lengths]
        return Sample(0, 0, [1], 1, True, True, [0], [[1]], draws, [], [0.0] * len(draws), 0.0, version, 50 * version)

    samples = [sample(1, 2, 4), sample(2, 3)]
    assert lag_figures(samples, 120, 50) == {
        "lag_steps": 70, "lag_steps_mean": 45.0, "lag_versions": 1, "versions": [1, 2],
    }  # fmt: skip
    assert text_figures(samples) == {"texts": 3, "text_tokens": 3.0}
    found = reward_figures(torch.tensor([[0.2, 0.4]]).log(), torch.tensor([0.1]).log())
    assert found["reward"] == pytest.approx(3)
    assert means([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}]) == {"a": 2.0, "b": 3.0}
    assert first_no_number(torch.tensor([[0.0, 1.0], [0.0, math.inf]])) == 1
    assert first_no_number(torch.zeros(2, 2)) is None


def test_publishing_and_saving_belong_to_the_step_before(tmp_path):
    run = RunFolder(tmp_path)
    run.log("published", step=0, version_step=0, publish_s=9.0)
    run.log("published", step=1, version_step=5, publish_s=0.5)
    run.log("saved", step=5, save_s=0.25)
    run.log("saved", step=6, save_s=0.125)
    found = saving_seconds(run)
    assert [found.get(step, 0.0) for step in (3, 4, 5)] == [0.0, 0.75, 0.125]
