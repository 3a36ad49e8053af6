"""Who gets which cores, and which job holds the other up."""

import os

import pytest
import torch

from align.config import MainJob
from launch.main_job import MainJobRun
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


def test_only_who_starts_the_jobs_here_needs_their_gpus_here(monkeypatch, tmp_path):
    """On a cluster the recipe says how many ranks there are on all nodes; what is before and after them runs on one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(os, "environ", {})
    content = {"data": str(tmp_path / "none"), "run": str(tmp_path / "run")}
    align = {"trainer": {"processes": 16}, "generator": {"processes": 8}}
    of_cluster = MainJobRun(build(MainJob, {**content, "align": align}))
    with pytest.raises(UserError, match="need 24 GPUs, there are 8"):
        of_cluster.execute("")
    with pytest.raises(UserError, match="none"):  # got as far as the data
        of_cluster.execute("", stop_before_alignment=True)


@pytest.mark.parametrize(
    ("trainer_waits", "generator_waits", "said"),
    [(0.4, 0.0, "generator-bound"), (0.05, 0.3, "trainer-bound"), (0.02, 0.09, "balanced")],
)
def test_the_job_that_waits_is_not_the_one_that_needs_devices(trainer_waits, generator_waits, said):
    assert verdict(trainer_waits, generator_waits).startswith(said)
