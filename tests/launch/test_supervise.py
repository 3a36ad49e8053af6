"""Who gets which cores, and which job holds the other up."""

import os

import pytest
import torch

from align.config import MainJob
from launch.summary import verdict
from launch.supervise import cpu_split
from rec.runtime.config import build
from rec.runtime.errors import UserError


def job(cores: int | None) -> MainJob:
    return build(MainJob, {"data": "x", "run": "y", "align": {"generator": {"cpu_cores": cores}}})


def test_cores_are_shared_or_divided_and_never_all_given_away(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7, 8})
    assert cpu_split(job(None)) == (None, None)
    assert cpu_split(job(1)) == ({3, 5, 7}, {8})
    assert cpu_split(job(3)) == ({3}, {5, 7, 8})
    with pytest.raises(UserError, match="cpu_cores 4 leaves none of 4 cores for the trainer; give it 3 at most"):
        cpu_split(job(4))
    monkeypatch.delattr(os, "sched_setaffinity")
    assert cpu_split(job(None)) == (None, None)
    with pytest.raises(UserError, match="needs Linux"):
        cpu_split(job(1))


@pytest.mark.parametrize(
    ("trainer_waits", "generator_waits", "said"),
    [(0.4, 0.0, "generator-bound"), (0.05, 0.3, "trainer-bound"), (0.02, 0.09, "balanced")],
)
def test_the_job_that_waits_is_not_the_one_that_needs_devices(trainer_waits, generator_waits, said):
    assert verdict(trainer_waits, generator_waits).startswith(said)
