"""Who gets which cores, who is started again and when, and which job holds the other up."""

import os
import sys
from pathlib import Path

import pytest
import torch

from align.config import MainJob
from launch import supervise
from launch.alignment.main_job import MainJobRun
from launch.alignment.summary import _after_starting, _tokens_per_s, verdict
from launch.supervise import Child, cpu_split, watch_once
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder


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


def test_generators_beside_each_other_are_as_fast_as_all_and_none_counts_its_start():
    rows = [(0, 11, 9.0, 10), (1, 12, 9.0, 10), (0, 11, 1.0, 50), (1, 12, 2.0, 50), (1, 13, 9.0, 10), (1, 13, 3.0, 100)]
    generated = [
        {"generator": number, "pid": pid, "generate_s": seconds, "tokens": tokens}
        for number, pid, seconds, tokens in rows
    ]
    later = _after_starting(generated)
    assert later == [generated[2], generated[3], generated[5]]
    assert _tokens_per_s(later) == 50 / 1 + 150 / 5
    assert _after_starting(generated[:2]) == generated[:2]


def child(folder: Path, name: str, program: str, **options: object) -> Child:
    """A job that runs a line of Python."""
    commands = options.pop("commands", [])

    def command() -> list[str]:
        commands.append(program)
        return [sys.executable, "-c", program]

    return Child(name, command, {}, folder / f"{name}.log", lambda: 0, **options)


@pytest.fixture
def stopped():
    """Ends the jobs that it is given."""
    jobs: list[Child] = []
    yield jobs
    for one in jobs:
        one.stop()


def test_a_generator_that_hangs_is_started_again_when_the_trainer_has_died_of_waiting(tmp_path, stopped):
    waits = (
        f"from align.samples import SampleLog; from pathlib import Path; SampleLog(Path({str(tmp_path)!r})).wait(3, 0)"
    )
    commands: list[str] = []
    trainer = child(tmp_path, "trainer", waits, commands=commands)
    generator = child(tmp_path, "generator", "import time; time.sleep(1000)")
    stopped += [trainer, generator]
    for one in (generator, trainer):
        one.start()
    hanging = generator.process.pid
    trainer.process.wait(60)
    watch_once([trainer, generator], 3, RunFolder(tmp_path))
    assert generator.process.pid != hanging
    assert generator.process.poll() is None
    # The trainer too, by a command made anew: its port may be taken by now.
    assert len(commands) == 2
    assert [row["job"] for row in RunFolder(tmp_path).events("restarted")] == ["trainer", "generator"]


def test_a_generator_is_left_alone_when_the_trainer_died_of_something_else(tmp_path, stopped):
    trainer = child(tmp_path, "trainer", "raise ValueError('out of luck')")
    generator = child(tmp_path, "generator", "import time; time.sleep(1000)")
    stopped += [trainer, generator]
    for one in (generator, trainer):
        one.start()
    same = generator.process.pid
    trainer.process.wait(60)
    watch_once([trainer, generator], 3, RunFolder(tmp_path))
    assert generator.process.pid == same


def test_a_generator_that_hangs_alone_is_given_up_on(tmp_path, monkeypatch):
    hanging = child(tmp_path, "generator", "import time; time.sleep(1000)")
    monkeypatch.setattr(supervise, "_generator", lambda job, number: hanging)
    content = {"data": "x", "run": str(tmp_path), "align": {"wait_timeout_s": 1}}
    with pytest.raises(TimeoutError, match=r"waited 1 s for the generator to get any further; see .*generator.log"):
        supervise.generate(build(MainJob, content))
    assert hanging.process.poll() is not None


def test_a_generator_that_ended_although_a_batch_is_missing_is_started_again(tmp_path, stopped):
    missing = [True]
    generator = child(tmp_path, "generator", "pass", is_done=lambda: not missing)
    stopped.append(generator)
    for _ in range(2):
        generator.start()
        generator.process.wait(60)
        first = generator.process.pid
        watch_once([generator], 3, RunFolder(tmp_path))
        assert (generator.process.pid != first) == bool(missing)
        missing.clear()
        generator.process.wait(60)


def test_how_long_to_wait_and_how_often_to_restart_is_not_what_a_run_computes():
    base = {"data": "x", "run": "y"}
    patient = build(MainJob, {**base, "align": {"wait_timeout_s": 3, "max_restarts": 9}})
    assert patient.identity == build(MainJob, base).identity
    assert patient.identity != build(MainJob, {**base, "align": {"id_dropout": 0.5}}).identity
