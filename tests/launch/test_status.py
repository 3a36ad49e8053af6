"""What a run folder tells: the state of a run, its logs, and what the doctor says would be resumed."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from align.config import MainJob
from launch.cluster import doctor
from launch.cluster.identities import identities
from launch.cluster.status import _is_over, follow, status
from llm.lmrec_job import LMRecJob
from llm.recformer.job import RecformerJob
from rec.job import RecJob, load_job
from rec.runtime import files
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import build, hash_of
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, METRICS, RunFolder
from rec.runtime.stopping import STOP


def note(run: RunFolder, event: str, **more: object) -> None:
    run.log(event, job="7", restart=0, nodes="n[1-2]", **more)


def submitted(run: RunFolder, number: int) -> None:
    facts = {"job": "7", "command": "x", "commit": None, "uncommitted_changes": False, "submitted_at_s": time.time()}
    files.write_json(run.path / "slurm" / f"submission-{number}" / "environment.json", facts)


def test_a_job_that_was_refused_says_nothing_about_the_one_that_runs(tmp_path):
    run = RunFolder(tmp_path)
    note(run, "attempt")
    run.log("failed", job="8", restart=0, code=2)
    assert status(tmp_path).state == "running"
    note(run, "failed", code=2)
    assert status(tmp_path).state == "failed"
    submitted(run, 1)
    assert status(tmp_path).state == "submitted", "what failed is over"


def test_a_run_whose_locks_are_held_lives_however_long_it_says_nothing(tmp_path):
    run = RunFolder(tmp_path)
    note(run, "attempt")
    later = time.time() + 3600
    with run.lock("trainer"):
        found = status(tmp_path, later)
        assert (found.state, f"its trainer runs as process {os.getpid()} on" in found.sentence) == ("running", True)
    found = status(tmp_path, later)
    assert (found.state, "look at its job first (squeue --jobs=7)" in found.sentence) == ("silent", True)


@pytest.mark.parametrize(("event", "more"), [("failed", {"code": 1}), ("requeued", {"why": "warned"}), ("stopped", {})])
def test_whoever_goes_on_with_a_run_by_hand_is_what_it_does(tmp_path, event, more):
    run = RunFolder(tmp_path)
    note(run, "attempt")
    note(run, event, **more)
    assert status(tmp_path).state == event
    with run.lock("launcher"):
        assert status(tmp_path).state == "running"
        assert not _is_over(run)


def test_the_time_between_two_attempts_is_not_that_of_a_step(tmp_path):
    rows, now = [], 0.0
    for step in range(20):
        now += 10_800.0 if step == 10 else 2.0
        rows.append({"event": "train", "step": step, "time_s": now, "pid": 1 + (step >= 10)})
    (tmp_path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / CONFIG).write_text("align: {trainer: {steps: 3000}}\n")
    assert any("train: 20 of 3000, 2.00 s each, 99.3 min to go" in line for line in status(tmp_path).lines)


def test_the_steps_of_recformers_stages_are_progress_too(tmp_path):
    run = RunFolder(tmp_path)
    for event in ("pt_step", "ft1_step"):
        run.log(event, step=4, epoch=1, loss=2.5)
        assert any(line.startswith(f"{event}: 5; loss 2.5") for line in status(tmp_path).lines)
    for title in ("pretrain", "finetune", "finetune"):  # a stage that was killed and went on
        run.log("stage", title=title, seconds=1.0)
    assert "stages done: 2, the last one 'finetune'" in status(tmp_path).lines


def test_a_job_that_died_before_it_knew_its_run_is_not_called_waiting(tmp_path):
    run = RunFolder(tmp_path)
    submitted(run, 1)
    out = tmp_path / "slurm" / "batch-7.out"
    assert status(tmp_path).state == "submitted"
    out.write_text("srun: error: execve(): /env/bin/python: No such file or directory\n")
    assert status(tmp_path).state == "submitted", "it may be just beginning"
    os.utime(out, (1, 1))
    found = status(tmp_path)
    assert (found.state, "execve(): /env/bin/python" in found.sentence) == ("failed", True)
    assert len(list(follow(tmp_path, 5, forever=True))) == 1
    note(run, "attempt")
    assert status(tmp_path).state == "running"


def test_the_state_of_a_run_is_read_off_its_folder(recipe, tmp_path):
    job = load_job(recipe)
    with pytest.raises(UserError, match="is no run folder"):
        status(tmp_path)
    run = RunFolder(job.run)
    run.claim(job)
    submitted(run, 1)
    assert status(run.path).state == "submitted", "what waits in the queue does not run, however new its files"
    note(run, "attempt")
    assert status(run.path).state == "running"
    for epoch in range(2):
        run.log("epoch", step=epoch, loss=2.5 - epoch)
    found = status(run.path)
    assert any("epoch: 2 of 2" in line and "loss 1.5" in line for line in found.lines)
    assert any("attempts: 1, warned 0 times; last on n[1-2]" in line for line in found.lines)
    assert status(run.path, time.time() + 3600).state == "silent"
    (run.path / STOP).touch()
    assert status(run.path).state == "stopping"
    assert status(run.path, time.time() + 3600).state == "stopped"
    note(run, "requeued", why="stopped")
    assert status(run.path).state == "requeued"
    (run.path / STOP).unlink()
    note(run, "attempt")
    logs = run.path / "logs" / "job-7-1"
    logs.mkdir(parents=True)
    (logs / "train-0.log").write_text("starting\nerror: data/x is no prepared folder\n")
    note(run, "failed", code=2)
    found = status(run.path)
    assert (found.state, found.sentence) == ("failed", "job 7 ended with exit code 2: data/x is no prepared folder")
    run.write_result("x", "y", {}, [], 1.0)
    assert status(run.path).state == "finished"


def test_logs_are_those_of_the_latest_attempt_and_go_on_until_the_result(tmp_path):
    run = RunFolder(tmp_path)
    for attempt in (0, 1):
        folder = tmp_path / "logs" / f"job-7-{attempt}"
        folder.mkdir(parents=True)
        (folder / "train-0.log").write_text("".join(f"attempt {attempt} line {nth}\n" for nth in range(5)) + "half a l")
        os.utime(folder, (attempt, attempt))
    assert list(follow(tmp_path, 2, forever=False)) == ["train-0: attempt 1 line 3", "train-0: attempt 1 line 4"]
    assert list(follow(tmp_path, 0, forever=False)) == []
    lines = follow(tmp_path, 1, forever=True)
    assert next(lines) == "train-0: attempt 1 line 4"
    with (tmp_path / "logs" / "job-7-1" / "train-0.log").open("a") as stream:
        stream.write("ine\n")
    assert next(lines) == "train-0: half a line"
    run.write_result("x", "y", {}, [], 1.0)
    assert list(lines) == []


def test_following_the_logs_of_a_failed_run_ends_and_shows_why_a_newer_job_did_not_start(tmp_path):
    run = RunFolder(tmp_path)
    for name in ("logs/job-7-0/train-0.log", "slurm/batch-7.out", "slurm/batch-8.out"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"of {name}\n")
    os.utime(tmp_path / "slurm" / "batch-7.out", (1, 1))
    note(run, "attempt")
    note(run, "failed", code=2)
    said = list(follow(tmp_path, 5, forever=True))
    assert [line.partition(":")[0] for line in said] == ["batch-7", "batch-8", "train-0"]


def test_the_doctor_says_what_would_be_resumed_and_why(recipe, tmp_path, capsys):
    job = load_job(recipe)
    run = RunFolder(job.run)
    with pytest.raises(UserError, match="is no run folder"):
        doctor.diagnose(run.path)
    run.claim(job)
    [found] = doctor.diagnose(run.path)
    assert found.verdict == "nothing, it begins at the beginning: there is none"
    data_hash = json.loads((Path(job.data) / "meta.json").read_text())["content_hash"]
    meta = {"config_hash": hash_of(job.rec), "data_hash": data_hash}
    checkpoints = Checkpoints(run.path / "checkpoints", keep_last=9)
    for step in (5, 10, 15):
        checkpoints.save(step, {"weights": torch.zeros(3)}, meta)
    (run.path / "checkpoints" / "step-15" / "rank-0.pt").write_bytes(b"cut")
    (run.path / "checkpoints" / ".tmp-step-20").mkdir()
    doctor.print_diagnoses(run.path)
    said = capsys.readouterr().out
    assert "step-15: damaged: rank-0.pt has 3 bytes, not" in said
    assert "step-10: whole, 1 ranks, 1 files" in said
    assert "would be resumed: step-10: the newest that is whole, 1 after it are damaged; of 1 ranks" in said
    assert "left behind by a kill" in said
    path = run.path / "checkpoints" / "step-10" / "rank-0.pt"
    path.write_bytes(bytes(path.stat().st_size))
    (run.path / "checkpoints" / "step-5" / "holiday.jpg").touch()
    (run.path / "checkpoints" / "step-5" / "zero-universal").mkdir()
    (run.path / "checkpoints" / "step-5" / "zero-universal" / "x").touch()
    with run.lock("trainer"):
        doctor.print_diagnoses(run.path)
    said = capsys.readouterr().out
    assert "step-10: damaged: rank-0.pt cannot be read" in said
    assert "step-5: whole" in said
    assert "not its own: holiday.jpg\n" in said
    assert "would be resumed: step-5: the newest that is whole, 2 after it are damaged" in said
    assert f"in use: its trainer runs as process {os.getpid()}" in said
    checkpoints.save(30, {}, {**meta, "config_hash": "0123"})
    [found] = doctor.diagnose(run.path)
    assert "was written with another recipe (0123, now" in found.verdict


PRETRAINING = {
    "lmrec": {"lmrec": {"context": 48}, "train": {"processes": 2}},
    "recformer": {"recformer": {"backbone": "x", "pretrain": {}, "finetune": {}}},
}


@pytest.mark.parametrize(
    ("sections", "folder"),
    [
        ({"rec": {"grid": {"train.lr": [0.1]}}}, "grid/lr=0.1"),
        ({"llm": PRETRAINING["lmrec"]}, ""),
        ({"llm": PRETRAINING["recformer"]}, "pretrain"),
        ({"llm": PRETRAINING["recformer"]}, "finetune/FT2"),
        ({"align": {}}, ""),
        ({"align": {"reward_users": 0.5}}, "without-reward-users/base"),
        ({"align": {}}, "llm"),
        ({"align": {}}, "control"),
    ],
)
def test_the_doctor_promises_no_resume_that_would_be_refused(small_data, tmp_path, sections, folder):
    """Of every kind of run and stage; one that lies where a folder is called like a checkpoint."""
    run = RunFolder(tmp_path / "step-1" / "run")
    content = {"data": str(small_data.folder), "run": str(run.path), **sections}
    llm = sections.get("llm", {})
    kind = RecformerJob if "recformer" in llm else LMRecJob if llm else MainJob if "align" in sections else RecJob
    run.claim(build(kind, content))
    identity = identities(run.path)[run.path / folder]
    data_hash = identity.combine([small_data.meta["content_hash"]])
    checkpoints = Checkpoints(run.path / folder / "checkpoints", keep_last=9)
    for step, meta, expected in (
        (1, {"config_hash": identity.config_hash, "data_hash": data_hash}, "step-1: the newest"),
        (2, {"config_hash": "0123", "data_hash": data_hash}, "nothing: step-2 was written with another recipe (0123"),
        (3, {"config_hash": identity.config_hash, "data_hash": "0123"}, "nothing: step-3 was written with other data"),
    ):
        checkpoints.save(step, {}, meta)
        assert doctor.diagnose(run.path)[-1].verdict.startswith(expected)
