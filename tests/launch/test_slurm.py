"""Batch jobs under a real SLURM: what the scheduler may do to a run, and that none of it changes a bit of the result.

A run whose samples are recorded trains on them again exactly (the trainer is a function of initial weights, seed and
sample log), so the runs that are requeued and preempted are given the samples of the undisturbed one and must end like
it. The runs whose generator is disturbed have samples of their own, and must equal their own replay.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from pyarrow import parquet

sys.path += [str(Path(__file__).parents[1] / "llm"), str(Path(__file__).parents[1] / "llm" / "recformer")]
import pretraining
from backbones import save_bert
from slurm_cluster import PATH, Cluster, assert_the_doctor_knows_every_stage, everything, started
from tiny_job import RECIPE, ROOT, STEPS, assert_no_sample_lost_or_repeated, final_weights
from tiny_recformer import write_recipe

from align.config import Stages
from align.samples import SampleLog
from launch.cluster.status import status
from rec.runtime.config import read_recipe
from rec.runtime.runfolder import CONFIG, METRICS, RunFolder
from rec.runtime.stopping import STOP

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        not all(shutil.which(name, path=PATH) for name in ("slurmctld", "slurmd", "munged")),
        reason="no SLURM here: launch/slurm/test-cluster.sh install",
    ),
]
ALIGNMENT = ("--nodes", "3", "--generator-nodes", "1")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with started(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


def recommender(folder: Path, data: Path, **train: object) -> Path:
    """The recipe of a recommender that could go on for minutes; its run folder is ``folder``/run."""
    train = {"batch_size": 8, "epochs": 5000, "patience": 5000, "checkpoint_every": 1, **train}
    rec = {"model": {"dim": 16, "heads": 2, "blocks": 1, "max_length": 8}, "train": train}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": str(data), "run": str(folder / "run"), "rec": rec}))
    return path


@pytest.fixture(scope="module")
def failing(cluster: Cluster, small_data, tmp_path_factory) -> dict[str, tuple[str, RunFolder]]:
    """Jobs that mostly wait, submitted early to do so beside others: one with a mistake, one that dies of a bug."""
    jobs = {}
    for name in ("mistake", "bug"):
        folder = tmp_path_factory.mktemp(name)
        run, data = RunFolder(folder / "run"), folder / "none"
        if name == "bug":  # it dies of its first checkpoint
            (run.path / "checkpoints").touch()
            data = small_data.folder
        jobs[name] = cluster.submit(recommender(folder, data), "--nodes", "1"), run
    return jobs


@pytest.fixture(scope="module")
def finished(failing, cluster: Cluster, small_data, tmp_path_factory) -> RunFolder:
    """An undisturbed run: from a recipe to the result, two nodes training and one generating."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": str(small_data.folder), "run": str(folder / "run"), **RECIPE}))
    job = cluster.submit(recipe, *ALIGNMENT)
    run = RunFolder(folder / "run")
    cluster.finish(job, run)
    return run


def again(finished: RunFolder, folder: Path, samples: int) -> RunFolder:
    """The run as it was when alignment began, with so many batches of samples recorded.

    With all of them, what the generator wrote and what is made of its texts at the end is there too.
    """
    run, whole = folder / "run", samples == STEPS
    shutil.copytree(finished.path, run)
    for name in ("checkpoints", "snapshots", "logs", "slurm", *(() if whole else ("seralm", "control"))):
        shutil.rmtree(run / name)
    for name in ("result.json", METRICS, *(() if whole else ("knowledge/aligned.parquet",))):
        (run / name).unlink()
    for row in finished.events() if whole else []:
        if row["event"] in ("generated", "refresh"):
            RunFolder(run).log(**row)
    for path in sorted((run / "samples").glob("batch-*.parquet"))[samples:]:
        path.unlink()
    return RunFolder(run)


def assert_same(run: RunFolder, other: RunFolder) -> None:
    """Every step's losses, and the final weights, bit for bit."""
    for key in ("policy_loss", "rec_loss", "kl"):
        ours, theirs = ([row[key].hex() for row in folder.steps("train")] for folder in (run, other))
        assert len(ours) == STEPS
        assert ours == theirs
    ours, theirs = final_weights(run), final_weights(other)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def assert_equals_its_replay(run: RunFolder, folder: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "align", "--replay", str(run.path), "--out", str(folder / "replay")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert_same(run, RunFolder(folder / "replay"))


def test_two_nodes_train_one_generates_and_the_folder_tells_it(cluster, finished):
    started_by = finished.events("trainer_started")[-1]
    assert (started_by["world_size"], started_by["engine"]) == (2, "DeepSpeedEngine")
    [attempt] = finished.events("attempt")
    logs = finished.path / "logs" / f"job-{attempt['job']}-0"
    assert {path.name for path in logs.iterdir()} == {
        "before-0.log", "trainer-0.log", "trainer-1.log", "generator-0.log", "after-0.log",
    }  # fmt: skip
    assert_no_sample_lost_or_repeated(finished)
    assert "finished" in (finished.path / "slurm" / f"batch-{attempt['job']}.out").read_text()

    submission = finished.path / "slurm" / "submission-1"
    environment = json.loads((submission / "environment.json").read_text())
    subprocess.run(["git", "cat-file", "-e", f"{environment['commit']}^{{commit}}"], cwd=ROOT, check=True)
    assert environment["job"] == attempt["job"]
    assert environment["packages"]["torch"] == torch.__version__
    assert yaml.safe_load((submission / "recipe.yaml").read_text())["run"] == str(finished.path)

    assert_the_doctor_knows_every_stage(finished)
    said = cluster.recalign("status", finished.path)
    assert said.startswith(f"{finished.path}: finished")
    assert f"as job {attempt['job']} by 'recalign submit" in said
    assert "last on n[1-3]" in said
    assert "trainer-1: " in cluster.recalign("logs", finished.path, "-n", "3")


def test_a_mistake_is_not_requeued_and_a_bug_once_in_case_it_gets_any_further(cluster, failing):
    for name, attempts in (("mistake", 1), ("bug", 2)):
        job, run = failing[name]
        cluster.end(job, run, "FAILED")
        assert len(run.events("attempt")) == attempts, everything(run)
        assert len(run.events("failed")) == 1
        assert status(run.path).state == "failed"


def test_the_page_about_clusters_can_be_followed_command_for_command(tmp_path):
    """Every command of the first section of docs/cluster.md; the run and the cluster are in folders of this test."""
    section = (ROOT / "docs" / "cluster.md").read_text().partition("## From nothing")[2].partition("\n## ")[0]
    commands = re.findall(r"^\$ (.+)$", section, re.MULTILINE)
    assert len(commands) == 9
    places = {"/tmp/slurm": str(tmp_path / "slurm"), "runs": str(tmp_path / "runs")}
    (tmp_path / "runs").mkdir()
    own = f"--sbatch=--chdir={ROOT} run={tmp_path}/runs/sasrec-closed-world"
    script = ["set -eu", 'recalign() { "$RECALIGN_PYTHON" -m launch.cli "$@"; }', "export -f recalign"]
    for command in commands:
        command = re.sub(r"(?<!recipes/)\b(runs)\b|/tmp/slurm", lambda found: places[found[0]], command)
        if "submit" in command:
            command += f" {own}"
        if command.startswith("salloc"):  # which looks for a program, and finds something to mend on one machine
            command = command.replace("recalign", f"{sys.executable} -m launch.cli") + " || test $? = 1"
        script.append(f"echo '$ {command}'; {command}")
    environment = {**os.environ, "PATH": PATH, "PYTHONPATH": str(ROOT), "RECALIGN_PYTHON": sys.executable}
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
    )
    subprocess.run([str(ROOT / "launch/slurm/test-cluster.sh"), "stop", str(tmp_path / "slurm")], check=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("ranks: 2 on n1, n2", "MEND  addresses", "Submitted job", "sasrec-closed-world: finished", "step-"):
        assert said in done.stdout, done.stdout + done.stderr


def test_a_requeued_job_goes_on_where_it_was(cluster, finished, tmp_path):
    run = again(finished, tmp_path, STEPS)
    job = cluster.submit(run.path / CONFIG, *ALIGNMENT)
    cluster.wait(job, run, lambda: len(run.steps("train")) > 5)
    cluster.run("scontrol", "requeue", job)
    cluster.finish(job, run)
    assert len(run.events("attempt")) == 2
    assert_same(run, finished)


def test_a_job_that_a_higher_priority_takes_the_nodes_from_goes_on_afterwards(cluster, finished, tmp_path):
    run = again(finished, tmp_path, STEPS)
    job = cluster.submit(run.path / CONFIG, *ALIGNMENT, "--sbatch=--partition=main")
    cluster.wait(job, run, lambda: len(run.steps("train")) > 5)
    urgent = ("--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    cluster.run("sbatch", *urgent)
    cluster.wait(job, run, lambda: bool(run.events("requeued")))
    assert status(run.path).state == "requeued"
    cluster.finish(job, run)
    assert len(run.events("warned")) == 1
    [requeued] = run.events("requeued")
    assert requeued["why"] == "warned"
    # Nothing was computed twice: every rank saved the step at which all of them stopped.
    assert len(run.events("train")) == STEPS
    assert_same(run, finished)


def test_a_job_whose_time_is_up_goes_on_although_its_generator_hangs(cluster, finished, tmp_path):
    run = again(finished, tmp_path, STEPS // 2)
    job = cluster.submit(run.path / CONFIG, *ALIGNMENT, "--sbatch=--time=60 --signal=B:USR1@30")
    cluster.wait(job, run, lambda: bool(run.events("generated")))
    generator = run.events("generated")[-1]["pid"]
    os.kill(generator, signal.SIGSTOP)  # neither generates nor sees that it is to stop
    elapsed = cluster.run("squeue", "--noheader", f"--jobs={job}", "--format=%M").strip().split(":")
    minutes = (int(elapsed[-2]) * 60 + int(elapsed[-1]) + 35) // 60 + 1
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    cluster.wait(job, run, lambda: bool(run.events("requeued")))
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    cluster.finish(job, run)
    assert len(run.events("warned")) == 1
    assert_no_sample_lost_or_repeated(run)
    assert_equals_its_replay(run, tmp_path)


def test_a_generator_that_is_killed_is_started_again_beside_the_trainer(cluster, finished, tmp_path):
    run = again(finished, tmp_path, 0)
    job = cluster.submit(run.path / CONFIG, *ALIGNMENT)
    cluster.wait(job, run, lambda: len(run.steps("train")) > 5)
    os.kill(run.events("generated")[-1]["pid"], signal.SIGKILL)
    cluster.finish(job, run)
    assert {row["job_part"] for row in run.events("restarted")} == {"generator"}
    assert len({row["pid"] for row in run.events("generated")}) == 2
    assert len({row["pid"] for row in run.events("train")}) == 1
    assert len(run.events("attempt")) == 1
    assert_no_sample_lost_or_repeated(run)
    assert SampleLog(Stages(run.path).samples).next_step() == STEPS
    assert_equals_its_replay(run, tmp_path)


def test_generators_of_a_heterogeneous_job_are_counted_on_their_own_nodes(cluster, tmp_path):
    text = (ROOT / "launch" / "slurm" / "align-het.sbatch").read_text()
    script, out = tmp_path / "count.sbatch", tmp_path / "out"
    script.write_text(text.replace('begin "$@"', "nodes").replace('\nalign "$@"', '\necho "$PER_NODE $GENERATORS"'))
    cluster.run("sbatch", "--wait", f"--output={out}", "--gpus-per-node=1", ":", "--gpus-per-node=2", script)
    assert out.read_text() == "1 2\n"


HETEROGENEOUS = (*ALIGNMENT, "--het", "--sbatch=--gpus-per-node=1", "--sbatch-generators=--gpus-per-node=2")


@pytest.mark.parametrize(
    ("options", "ranks"), [(HETEROGENEOUS, 2), (("--nodes", "1", "--sbatch=--gpus-per-node=2 --cpus-per-task=8"), 1)]
)
def test_nodes_of_two_kinds_and_one_node_alone_divide_the_work_too(
    cluster, finished, tmp_path, monkeypatch, options, ranks
):
    run = again(finished, tmp_path, STEPS)
    monkeypatch.setitem(cluster.environment, "DS_ACCELERATOR", "cpu")  # these GPUs can only be counted
    cluster.finish(cluster.submit(run.path / CONFIG, *options), run)
    assert run.events("trainer_started")[-1]["world_size"] == ranks
    if ranks == 2:
        assert_same(run, finished)
    assert_no_sample_lost_or_repeated(run)


def test_a_second_job_is_refused_and_a_persons_stop_is_not_a_warning(cluster, small_data, tmp_path):
    recipe, run = recommender(tmp_path, small_data.folder), RunFolder(tmp_path / "run")
    job = cluster.submit(recipe, "--nodes", "1")
    cluster.wait(job, run, lambda: len(run.events("epoch")) > 3)
    second = cluster.submit(recipe, "--nodes", "1")
    cluster.end(second, run, "FAILED")
    [attempt] = run.events("attempt")
    owner = f"its job runs as process {attempt['pid']} on {attempt['nodes']} in SLURM job {job}"
    assert owner in (run.path / "slurm" / f"batch-{second}.out").read_text()
    assert cluster.state(job) == "RUNNING"
    assert {row["job"] for row in run.events() if "job" in row} == {job}

    (run.path / STOP).touch()
    cluster.end(job, run, "COMPLETED")
    assert [row["event"] for row in run.events() if "job" in row] == ["attempt", "stopped"]
    assert run.result() is None
    assert status(run.path).state == "stopped"
    with pytest.raises(AssertionError, match="STOP asks this run to stop: delete it"):
        cluster.submit(recipe, "--nodes", "1")
    (run.path / STOP).unlink()
    done = len(run.steps("epoch"))
    again = cluster.submit(recipe, "--nodes", "1")
    cluster.wait(again, run, lambda: len(run.steps("epoch")) > done)
    cluster.run("scancel", again)
    assert min(row["step"] for row in run.events("epoch") if row["time_s"] > attempt["time_s"]) == 0
    assert len(run.events("epoch")) <= len(run.steps("epoch")) + 1, "it went on where it was"


def test_lmrec_goes_on_bit_for_bit_on_two_nodes_after_a_warning_that_came_before_it_began(
    cluster, small_data, tmp_path
):
    """The Python that all of it needs is found inside of the container alone."""
    image = tmp_path / "image"
    image.mkdir()
    (image / "python-of-the-image").write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    (image / "python-of-the-image").chmod(0o755)
    site = tmp_path / "site.sh"
    inside = f'\nRECALIGN_PYTHON=python-of-the-image\nRECALIGN_PREFIX=(env "PATH={image}:$PATH")\n'
    site.write_text((ROOT / "launch" / "slurm" / "site.sh").read_text() + inside)
    jobs = {}
    for name in ("whole", "warned"):
        (tmp_path / name).mkdir()
        recipe = pretraining.recipe(tmp_path / name, small_data.folder, zero_stage=2)
        jobs[name] = cluster.submit(recipe, "--nodes", "2", f"--site={site}"), RunFolder(tmp_path / name / "run")
    job, run = jobs["warned"]
    cluster.wait(job, run, lambda: (run.path / "slurm" / f"batch-{job}.out").exists())
    time.sleep(0.5)
    assert not run.events("attempt")
    cluster.run("scancel", "--signal=USR1", "--batch", job)
    for job, run in jobs.values():
        cluster.finish(job, run)
        assert run.steps("lm_step")[-1]["step"] == pretraining.STEPS - 1
        assert read_recipe(run.path / CONFIG)["llm"]["train"]["processes"] == 2
    assert [row["event"] for row in run.events() if "job" in row] == [
        "attempt", "warned", "requeued", "attempt", "finished",
    ]  # fmt: skip
    assert_the_doctor_knows_every_stage(run)
    whole, warned = (pretraining.final(run.path) for _, run in jobs.values())
    assert all(torch.equal(value, warned[name]) for name, value in whole.items())


def test_recformers_stages_follow_one_another_on_the_nodes_that_there_are(cluster, small_data, tmp_path):
    backbone = save_bert(tmp_path / "bert", dropout=0.1)
    few = {"epochs": 1, "checkpoint_every": 4}
    recipe = write_recipe(tmp_path, small_data.folder, backbone, pretrain=few, finetune={**few, "fixed_epochs": 1})
    run = RunFolder(tmp_path / "run")
    cluster.finish(cluster.submit(recipe, "--nodes", "2"), run)
    assert [row["stage"] for row in run.result()["rows"]] == ["PT", "FT2"]
    assert run.events("ft1_step")
    assert_the_doctor_knows_every_stage(run)
    assert read_recipe(run.path / CONFIG)["llm"]["recformer"]["processes"] == 2


def test_a_catalogs_texts_are_written_by_an_array_of_tasks(cluster, finished, tmp_path):
    out = tmp_path / "knowledge.parquet"
    log = f"--output={tmp_path}/task-%a.out"
    script = ROOT / "launch" / "slurm" / "knowledge.sbatch"
    cluster.run("sbatch", "--wait", "--array=0-1", log, script, finished.path, "--out", out)
    table = parquet.read_table(out)
    assert table.num_rows == 30 * RECIPE["llm"]["knowledge"]["texts"]
    assert len(table["vector"][0]) == RECIPE["llm"]["lmrec"]["dim"]
    aligned = parquet.read_table(Stages(finished.path).final_knowledge)
    assert table["text"].to_pylist() == aligned["text"].to_pylist()
