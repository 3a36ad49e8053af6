"""Scripts, and what is submitted to the scheduler: frozen, and refused where it cannot run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import cli
from launch.cluster import submit
from launch.cluster.status import status, submissions
from launch.cluster.submit import Wish
from launch.cluster.where import run_of, stages_of
from rec.job import load_job
from rec.runtime import files
from rec.runtime.errors import RESUME_ANYWAY, UserError
from rec.runtime.runfolder import CONFIG, RESULT, RunFolder
from rec.runtime.stopping import STOP
from rec.train import run as train_run

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "launch" / "slurm"


def alignment(folder: Path) -> Path:
    path = folder / "align.yaml"
    path.write_text(yaml.safe_dump({"data": "ml-100k", "run": str(folder / "aligned"), "align": {"refresh_every": 50}}))
    return path


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
    assert "needs one generator" in refused(Wish(aligned, ["align.others=newest"], 4, 2))
    assert "--sbatch-generators are for alignment" in refused(Wish(recipe, [], 1, generator_options=("--gpus=4",)))
    plain = tmp_path / "plain.yaml"
    plain.write_text(yaml.safe_dump({"data": "x", "run": "r", "llm": {"train": {"zero_stage": 0}}}))
    assert "zero_stage=0 is one process, --nodes is 2" in refused(Wish(plain, [], 2))
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


def test_blanks_and_per_cent_signs_of_a_run_folder_reach_the_scheduler_as_they_are(recipe, tmp_path, a_scheduler):
    run = tmp_path / r"my 5% run\1"
    script, _ = submit.submit(Wish(recipe, [f"run={run}"], 1, options=("--comment=a b",)), "test")
    assert shlex.split(re.search("^#SBATCH (.*--output.*)$", script, re.MULTILINE)[1]) == [
        f"--output={tmp_path}/my 5%% run\\1/slurm/batch-%j.out"
    ]
    assert "#SBATCH '--comment=a b'\n" in script


def test_a_refused_submission_costs_nothing(recipe, tmp_path, a_scheduler):
    run, sbatch = tmp_path / "run", tmp_path / "bin" / "sbatch"
    train_run(load_job(recipe), "test")
    before = {path: path.read_bytes() for path in run.rglob("[!.]*") if path.is_file()}
    sbatch.write_text("#!/bin/bash\necho invalid partition >&2; exit 1\n")
    with pytest.raises(UserError, match="sbatch: invalid partition"):
        submit.submit(Wish(recipe, [], 1), "test", fresh=True)
    assert {path: path.read_bytes() for path in run.rglob("[!.]*") if path.is_file()} == before
    (run / RESULT).unlink()
    with pytest.raises(UserError, match="sbatch: invalid partition"):
        submit.submit(Wish(recipe, [], 1), "test")
    assert status(run).state == "refused"


def test_a_job_that_waits_is_not_given_another_recipe(recipe, tmp_path, a_scheduler):
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text("#!/bin/bash\n[ $2 = --jobs=4711 ] && echo PENDING\n")
    squeue.chmod(0o755)
    submit.submit(Wish(recipe, [], 1), "test")
    submit.submit(Wish(recipe, [], 1, options=("--dependency=afterany:4711",)), "test")  # a chain of jobs
    other = Wish(recipe, ["rec.train.lr=0.5"], 1)
    with pytest.raises(UserError, match=r"job 4711 of .* is pending with another recipe: end it first \(scancel 4711"):
        submit.submit(other, "test")
    with pytest.raises(UserError, match="is pending with this recipe"):
        submit.submit(Wish(recipe, [], 1), "test", fresh=True)
    squeue.write_text("#!/bin/bash\nexit 1\n")  # over, and forgotten
    submit.submit(other, "test", fresh=True)
    assert [path.name for path in submissions(tmp_path / "run")] == ["submission-1"]


def test_a_talkative_site_and_a_host_without_git_do_not_matter(recipe, tmp_path, a_scheduler, monkeypatch):
    site = tmp_path / "site.sh"
    site.write_text("echo Loading cuda\n")
    which = submit.shutil.which
    monkeypatch.setattr(submit.shutil, "which", lambda name: None if name == "git" else which(name))
    assert submit.submit(Wish(recipe, [], 1, site=site), "test")[1] == "4711"
    facts = files.read_json(tmp_path / "run" / "slurm" / "submission-1" / "environment.json")
    assert (facts["commit"], facts["job"]) == (None, "4711")


def test_options_that_no_shell_would_read_are_one_line(recipe, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recalign", "submit", str(recipe), '--sbatch=--comment="abc'])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == 'error: --sbatch=--comment="abc: no closing quotation\n'


@pytest.mark.parametrize(
    "words", [["submit", "x", "--nodes", "-2"], ["plan", "x", "--mfu", "0"], ["logs", "x", "-n", "-1"]]
)
def test_numbers_that_mean_nothing_are_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["recalign", *words])
    with pytest.raises(SystemExit):
        cli.main()
    assert re.search(r"error: argument .*: \S+ is not (at least|above) ", capsys.readouterr().err)


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
