"""Scripts as they are rendered, run folders as they are read, allocations as they are judged; without a scheduler."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from align.config import MainJob
from launch.cluster import check, doctor, submit
from launch.cluster.identities import identities
from launch.cluster.status import follow, status, submissions
from launch.cluster.submit import Wish
from launch.cluster.where import run_of, stages_of
from llm.lmrec_job import LMRecJob
from llm.recformer.job import RecformerJob
from rec.job import RecJob, load_job
from rec.runtime import files
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import build, hash_of
from rec.runtime.errors import RESUME_ANYWAY, UserError
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import CONFIG, RESULT, RunFolder
from rec.runtime.stopping import STOP
from rec.train import run as train_run

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"
REC = {"model": {"dim": 16, "heads": 2, "blocks": 1, "max_length": 8}, "train": {"batch_size": 8, "epochs": 2}}


@pytest.fixture
def recipe(tmp_path, small_data) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": str(small_data.folder), "run": str(tmp_path / "run"), "rec": REC}))
    return path


def alignment(folder: Path) -> Path:
    path = folder / "align.yaml"
    path.write_text(yaml.safe_dump({"data": "ml-100k", "run": str(folder / "aligned"), "align": {"refresh_every": 50}}))
    return path


# --- scripts ---


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.s*")), ids=lambda path: path.name)
def test_every_script_is_bash_and_leaves_the_site_to_one_file(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    if path.suffix == ".sbatch":
        head = text.partition("#SBATCH")[0]
        assert f"launch/slurm/{path.name}" in head, "it begins with the command that uses it"
        assert "source launch/slurm/site.sh\n" in text
        assert "\ntrap EARLY=yes USR1\ncd " in text, "a warning may come at any time"
        for setting in ("partition", "account", "qos", "gpus", "gres", "module", "ib0"):
            assert setting not in text.partition("\ncd ")[0].replace(head, "")


@pytest.mark.parametrize(
    ("which", "nodes", "generators", "het", "expected"),
    [
        ("train", 2, None, False, ["#SBATCH --nodes=2\n", "rec.train --config"]),
        ("align", 3, 1, False, ["#SBATCH --nodes=3\n", "GENERATOR_NODES=1\n", "\ndivide\n"]),
        ("align", 1, None, False, ["#SBATCH --nodes=1\n", "GENERATOR_NODES=0\n"]),
        ("align", 5, 2, True, ["#SBATCH --nodes=3 --ntasks", "#SBATCH hetjob\n#SBATCH --nodes=2 --ntasks"]),
        ("pretrain", 2, None, False, ["#SBATCH --nodes=2\n", '"$module" --config']),
    ],
)
def test_a_dry_run_is_a_whole_script_and_writes_nothing(recipe, tmp_path, which, nodes, generators, het, expected):
    if which == "align":
        recipe = alignment(tmp_path)
    elif which == "pretrain":
        recipe.write_text(yaml.safe_dump({"data": "x", "run": str(tmp_path / "run"), "llm": {"train": {"steps": 1}}}))
    wish = Wish(recipe, [], nodes, generators, het, ("--time=1:00:00",))
    script, job = submit.submit(wish, "test", dry_run=True)
    assert job is None
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for text in (*expected, "#SBATCH --time=1:00:00\n", "/slurm/submission-1/recipe.yaml\nbegin", "kill_steps() {"):
        assert text in script
    assert "\nsource " not in script
    # What comes after the first command sbatch does not read.
    assert "#SBATCH" not in script.partition("trap EARLY")[2].replace("# --- ", "")
    assert not (tmp_path / "run").exists()


def test_mistakes_are_found_before_anything_is_submitted(recipe, tmp_path, monkeypatch):
    def refused(wish: Wish) -> str:
        with pytest.raises(UserError) as caught:
            submit.submit(wish, "test")
        return str(caught.value)

    aligned = alignment(tmp_path)
    assert "did you mean 'lr'" in refused(Wish(recipe, ["rec.train.lrr=1"], 1))
    for section in ("train", "recformer"):
        pretraining = tmp_path / f"{section}.yaml"
        pretraining.write_text(yaml.safe_dump({"data": "x", "run": "r", "llm": {section: {}}}))
        assert f"unknown key 'stepz' in llm.{section}" in refused(Wish(pretraining, [f"llm.{section}.stepz=1"], 1))
    assert "neither a pretrain nor a finetune" in refused(Wish(pretraining, [], 1))
    assert "has no section align" in refused(Wish(recipe, [], 2, 1))
    assert "--generator-nodes M" in refused(Wish(aligned, [], 2))
    assert "leaves none of 2 nodes" in refused(Wish(aligned, [], 2, 2))
    assert "divides one node, not 2" in refused(Wish(aligned, [], 2, 0))
    assert "site settings not found" in refused(Wish(recipe, [], 1, site=tmp_path / "none.sh"))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no sbatch here" in refused(Wish(recipe, [], 1))
    train_run(load_job(recipe), "test")
    assert "is finished: there is nothing to submit" in refused(Wish(recipe, [], 1))
    assert "holds a run of another recipe (rec.train.lr: 0.001 there, 0.5 now)" in refused(
        Wish(recipe, ["rec.train.lr=0.5"], 1)
    )


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x", *words], check=True)


def test_what_was_changed_and_added_since_the_commit_can_be_applied_to_it(tmp_path, monkeypatch):
    sources = tmp_path / "sources"
    (sources / "launch").mkdir(parents=True)
    (sources / "launch" / "old.py").write_text("one\n")
    git(sources, "init", "-q")
    git(sources, "add", ".")
    git(sources, "commit", "-q", "-m", "x")
    git(sources, "config", "diff.noprefix", "true")
    (sources / "launch" / "old.py").write_text("one\n\ttwo \n\n")  # which stripping would spoil
    (sources / "launch" / "new one.py").write_bytes("größer\n".encode())
    (sources / "binary").write_bytes(bytes(range(256)))
    monkeypatch.setattr(submit, "MAX_UNTRACKED_BYTES", 1000)
    (sources / "table.parquet").write_bytes(bytes(1001))
    patch, left_out = submit.uncommitted(sources / "launch")
    assert left_out == ["table.parquet"]
    subprocess.run(["git", "clone", "-q", sources, tmp_path / "again"], check=True)
    subprocess.run(["git", "-C", tmp_path / "again", "apply", "-"], input=patch, check=True)
    for name in ("launch/old.py", "launch/new one.py", "binary"):
        assert (tmp_path / "again" / name).read_bytes() == (sources / name).read_bytes()
    assert submit.uncommitted(tmp_path) == (b"", [])


@pytest.fixture
def a_scheduler(tmp_path, monkeypatch) -> Path:
    """An sbatch that writes what it is given, and whether the submission was described before."""
    (tmp_path / "bin").mkdir()
    sbatch, said = tmp_path / "bin" / "sbatch", tmp_path / "said"
    sbatch.write_text(f'#!/bin/bash\necho "$@" > {said}; ls "$(dirname "${{@: -1}}")" >> {said}; echo 4711\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return said


def test_a_submission_is_frozen_before_the_scheduler_hears_of_it(recipe, tmp_path, a_scheduler):
    run = tmp_path / "run"
    _, job = submit.submit(Wish(recipe, [], 1, options=("--time=5",)), "test")
    assert job == "4711"
    said = a_scheduler.read_text()
    assert said.startswith("--parsable --time=5 ")  # where they win over the site's SBATCH_TIMELIMIT
    assert {"environment.json", "job.sbatch", "recipe.yaml", "uncommitted.patch"} <= set(said.split())
    frozen = yaml.safe_load((run / "slurm" / "submission-1" / "recipe.yaml").read_text())
    assert frozen["rec"]["train"]["patience"] == load_job(recipe).rec.train.patience, "defaults are written out"
    assert load_job(run / "slurm" / "submission-1" / "recipe.yaml").rec == load_job(recipe).rec
    # Numbers are never used again, and are ordered as numbers.
    for number in (2, 9, 10):
        (run / "slurm" / f"submission-{number}").mkdir()
    (run / "slurm" / "submission-2").rmdir()
    submit.submit(Wish(recipe, [], 1), "test")
    assert [path.name.partition("-")[2] for path in submissions(run)] == ["1", "9", "10", "11"]
    assert any("submission-11" in line for line in status(run).lines)


def test_each_half_of_a_heterogeneous_job_may_have_options_of_its_own(tmp_path, a_scheduler):
    wish = Wish(alignment(tmp_path), [], 3, 1, True, ("--time=5",), ("--gpus-per-node=2",))
    script, _ = submit.submit(wish, "test")
    first, _, second = script.partition("#SBATCH hetjob\n")
    assert "--time=5" in first
    assert "--gpus-per-node=2" not in first
    assert "#SBATCH --time=5\n#SBATCH --gpus-per-node=2\n" in second
    assert a_scheduler.read_text().startswith("--parsable --time=5 : --time=5 --gpus-per-node=2 ")
    with pytest.raises(UserError, match="--sbatch-generators needs --het"):
        submit.submit(Wish(tmp_path / "align.yaml", [], 3, 1, False, (), ("--gpus=2",)), "test")


def test_a_finished_or_other_run_is_submitted_again_if_the_user_says_so(recipe, tmp_path, a_scheduler, monkeypatch):
    train_run(load_job(recipe), "test")
    other = Wish(recipe, ["rec.train.lr=0.5"], 1)
    monkeypatch.setenv(RESUME_ANYWAY, "1")
    with pytest.raises(UserError, match="is finished"):
        submit.submit(other, "test")
    (tmp_path / "run" / RESULT).unlink()
    script, _ = submit.submit(other, "test")
    assert f"export {RESUME_ANYWAY}=1\n" in script
    monkeypatch.delenv(RESUME_ANYWAY)
    (tmp_path / "run" / STOP).touch()
    with pytest.raises(UserError, match="STOP asks this run to stop: delete it"):
        submit.submit(Wish(recipe, [], 1), "test")
    (tmp_path / "run" / STOP).write_text("job 7: warned\n")  # a batch script's, whose node died
    script, _ = submit.submit(Wish(recipe, [], 1), "test")
    assert RESUME_ANYWAY not in script
    submit.submit(other, "test", fresh=True)
    assert not (tmp_path / "run" / CONFIG).exists()
    assert [path.name for path in submissions(tmp_path / "run")] == ["submission-1"]


def test_the_site_of_a_site_is_taken_instead_of_ours(recipe, tmp_path):
    site = tmp_path / "site.sh"
    site.write_text("export SBATCH_PARTITION=long  # of this test\n")
    script, _ = submit.submit(Wish(recipe, [], 1, site=site), "test", dry_run=True)
    assert "SBATCH_PARTITION=long  # of this test" in script


def test_where_finds_the_run_of_any_recipe(recipe, tmp_path):
    assert run_of(recipe, []) == tmp_path / "run"
    assert run_of(recipe, ["run=elsewhere"]) == Path("elsewhere")
    RunFolder(tmp_path / "run").claim(load_job(recipe))
    moved = (tmp_path / "run").rename(tmp_path / "moved")
    assert run_of(moved / CONFIG, []) == moved
    recipe.write_text("data: x\n")
    with pytest.raises(UserError, match="missing key 'run'"):
        run_of(recipe, [])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"rec": {}}, ("", [])),
        ({"llm": {}, "align": {}}, ("", [])),
        ({"llm": {"train": {}}}, ("llm.train.processes", ["llm.pretrain"])),
        ({"llm": {"recformer": {"finetune": {}}}}, ("llm.recformer.processes", ["llm.recformer.finetune"])),
        (
            {"llm": {"recformer": {"pretrain": {}, "finetune": {}}}},
            ("llm.recformer.processes", ["llm.recformer.pretrain", "llm.recformer.finetune"]),
        ),
    ],
)
def test_a_batch_script_learns_which_modules_train(content, expected):
    assert stages_of(content) == expected


# --- what a run folder tells ---


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


def test_the_steps_of_recformers_stages_are_progress_too(tmp_path):
    run = RunFolder(tmp_path)
    for event in ("pt_step", "ft1_step"):
        run.log(event, step=4, epoch=1, loss=2.5)
        assert any(line.startswith(f"{event}: 5; loss 2.5") for line in status(tmp_path).lines)


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
        ({"rec": {**REC, "grid": {"train.lr": [0.1]}}}, "grid/lr=0.1"),
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


# --- an allocation ---


def measured(**more: object) -> dict:
    facts = {"rank": 0, "host": "a", "address": "10.0.0.1", "python": "3.11.7", "gpus": [], "cores": 8}
    speeds = {"sees_the_folder": 0.01, "write_mb_per_s": 900.0, "skew_s": 0.0, "all_reduce_gb_per_s": 20.0}
    versions = check.probe.facts()["versions"]
    return {**facts, **speeds, "versions": versions, "locks_reach": True, **more}


@pytest.mark.parametrize(
    ("difference", "name"),
    [
        ({"address": "127.0.1.1"}, "addresses"),
        ({"address": None}, "addresses"),
        ({"sees_the_folder": None}, "shared folder"),
        ({"sees_the_folder": 9.0}, "rename"),
        ({"locks_reach": False}, "locks"),
        ({"write_mb_per_s": 12.0}, "writing"),
        ({"skew_s": -3.0}, "clocks"),
        ({"python": "3.12.1"}, "python"),
        ({"gpus": ["H100"]}, "gpus"),
    ],
)
def test_what_is_wrong_with_one_node_is_named_with_its_remedy(difference, name, tmp_path):
    fine = list(check.judge([measured(), measured(host="b", rank=1)], tmp_path))
    assert all(result.fine for result in fine), fine
    results = check.judge([measured(), measured(host="b", rank=1, **difference)], tmp_path)
    assert [result.name for result in results if not result.fine] == [name]
    assert check.REMEDIES[name]


def test_a_slow_network_and_other_versions_are_named(tmp_path):
    slow = [measured(all_reduce_gb_per_s=0.1), measured(host="b", all_reduce_gb_per_s=0.1)]
    assert [result.name for result in check.judge(slow, tmp_path) if not result.fine] == ["all-reduce"]
    old = measured(versions=measured()["versions"] | {"torch": "2.4.0"})
    [pins] = [result for result in check.judge([old], tmp_path) if not result.fine]
    assert (pins.name, "torch 2.4.0, tested with" in pins.found) == ("pins", True)


class LooksFirst(Ranks):
    """A rank whose file system remembers, as NFS does, that something was not there when it looked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0, 1)
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "folder", folder)

    def barrier(self):
        self.seen.append((self.folder / "renamed").exists())


def test_the_rename_is_looked_for_before_it_happens(tmp_path, monkeypatch):
    looked, is_file = [], Path.is_file

    def look(path):
        looked.append((path.name, is_file(path)))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", look)
    ranks = LooksFirst(tmp_path)
    assert check.probe.rename_visible_s(tmp_path, ranks) < 30
    assert looked == [("content", False), ("content", True)]
    assert ranks.seen == [False, False, True]


def test_the_address_is_that_of_the_sites_interface(monkeypatch):
    monkeypatch.setenv("RECALIGN_INTERFACE", "lo")
    assert check.probe.own_address() == "127.0.0.1"
    monkeypatch.setenv("RECALIGN_INTERFACE", "none0")
    assert check.probe.own_address() is None


@pytest.mark.distributed
def test_two_processes_measure_each_other(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29671",
        "-m", "launch.cluster.check", "--folder", str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    said = {line[6:].partition(":")[0]: line for line in done.stdout.splitlines() if line[:4] in ("ok  ", "MEND")}
    assert {"all-reduce", "rename", "locks", "clocks", "versions", "pins"} <= set(said), done.stdout + done.stderr
    assert said["locks"] == "ok    locks: reach every node"
    assert said["rename"].startswith("ok")
    assert list(tmp_path.iterdir()) == []
