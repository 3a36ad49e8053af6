"""What ranks of pretraining jobs do when one of them is gone, or when rank 0 alone fails."""

import subprocess
from types import SimpleNamespace

import pytest

from llm import resharding, zero
from llm.lmrec_job import LMRecTrainConfig
from llm.recformer import engine
from llm.recformer.config import RecformerSettings
from rec.runtime.ranks import Ranks


def test_a_conversion_that_dies_without_a_word_is_an_error_that_every_rank_hears_of(tmp_path, monkeypatch):
    dead = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_args, **_kwargs: dead)
    with pytest.raises(RuntimeError, match=r"cannot convert .*: exit code -9"):
        resharding.make_universal(tmp_path / "zero", "engine", Ranks())


def test_ranks_wait_for_each_other_as_long_as_the_site_says(monkeypatch):
    monkeypatch.setenv("RECALIGN_TIMEOUT_S", "77")
    monkeypatch.setenv("WORLD_SIZE", "2")
    waits = []

    def group(timeout, **_backend):
        waits.append(timeout.total_seconds())
        return SimpleNamespace(num_processes=2)

    def accelerator(kwargs_handlers, **_more):
        return group(kwargs_handlers[-1].timeout)

    monkeypatch.setattr(zero, "PartialState", group)
    monkeypatch.setattr(engine, "Accelerator", accelerator)
    zero.start_group(LMRecTrainConfig(processes=2))
    for stage in (0, 2):
        settings = RecformerSettings.model_construct(processes=2, zero_stage=stage)
        engine.make_accelerator(settings, SimpleNamespace(batch_size=4, clip_norm=1.0))
    assert waits == [77, 77, 77]
