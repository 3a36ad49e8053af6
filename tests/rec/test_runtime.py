"""Configuration, run folders and checkpoints: what a kill or a typo can and cannot do."""

import errno
import json
import logging
import math
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import Field

from rec.runtime import config, files
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import METRICS, RunFolder, run_override


class Inner(config.Section):
    lr: float = Field(1e-3, gt=0)
    layers: int = 2
    name: str | None = None


class Outer(config.Section):
    run: Path = Path("run")
    train: Inner = Inner()


# --- configuration ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": {"lr_rate": 1}}, "unknown key 'lr_rate' in train; did you mean 'lr'?"),
        ({"trian": {}}, "unknown key 'trian' in the recipe; did you mean 'train'?"),
        ({"train": {"xyz": 1}}, "unknown key 'xyz' in train; valid keys: lr, layers, name"),
        ({"train": {"lr": "fast"}}, "train.lr: Input should be a valid number"),
        ({"train": {"lr": 0}}, "train.lr: Input should be greater than 0, got 0"),
        ({"train": {"layers": 1.5}}, "train.layers: Input should be a valid integer"),
        ({"train": 3}, "train: Input should be a valid"),
    ],
)
def test_a_wrong_key_or_value_is_one_clear_line(content, message):
    with pytest.raises(UserError) as caught:
        config.build(Outer, content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_there_may_have_dots_of_its_own():
    content = {"variants": {"1.7M": [], "7M": [], "1": {"7M": 3}}, "a.b": {"c": 1}}
    found = config.apply_overrides(content, ["variants.1.7M=null", "variants.7M=x", "a.b.c=2", "a.d=4"])
    assert found == {"variants": {"1.7M": None, "7M": "x", "1": {"7M": 3}}, "a.b": {"c": 2}, "a": {"d": 4}}


def test_overrides_reach_nested_keys_and_parse_as_yaml():
    content = config.apply_overrides({"train": {"lr": 1}}, ["train.lr=1e-5", "train.name=null", "run=a/b"])
    built = config.build(Outer, content)
    assert (built.train.lr, built.train.name, built.run) == (1e-5, None, Path("a/b"))


@pytest.mark.parametrize("override", ["train.lr", "=3", "run.deeper=1", "train.lr=[1"])
def test_a_malformed_override_is_refused(override):
    with pytest.raises(UserError, match="override"):
        config.apply_overrides({"run": "x"}, [override])


@pytest.mark.parametrize("text", ["- a list", "key: [unclosed", ""])
def test_a_file_that_is_no_recipe_is_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=r"r\.yaml is not"):
        config.load(Outer, tmp_path / "r.yaml")
    with pytest.raises(UserError, match="recipe not found"):
        config.load(Outer, tmp_path / "absent.yaml")


def test_the_resolved_recipe_reads_back_the_same(tmp_path):
    built = config.build(Outer, {"train": {"lr": 0.5}})
    (tmp_path / "r.yaml").write_text(config.to_yaml(built))
    assert config.load(Outer, tmp_path / "r.yaml") == built
    assert config.hash_of(built) == config.hash_of(config.load(Outer, tmp_path / "r.yaml"))
    assert config.hash_of(built) != config.hash_of(Outer())


# --- run folder ---


def test_a_folder_of_another_recipe_is_refused_and_the_key_named(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.claim(Outer())
    run.claim(Outer())
    with pytest.raises(UserError, match=r"train\.lr: 0\.001 there, 0\.01 now"):
        run.claim(Outer(train=Inner(lr=0.01)))


def test_a_result_is_taken_for_no_recipe_but_its_own(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.claim(Outer())
    folder.write_result("test", "hash", {}, [], 1.0)
    (folder.path / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"holds a result.json of nobody knows what recipe"):
        folder.claim(Outer())
    monkeypatch.setenv("RECALIGN_RESUME_ANYWAY", "1")
    folder.claim(Outer())


def test_inputs_that_were_made_anew_are_refused(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    folder.require_the_same_inputs({"data": "1"})
    folder.require_the_same_inputs({"data": "1", "model": "a"})
    folder.require_the_same_inputs({"data": "1"})
    for changed in ({"data": "2"}, {"model": "b"}):
        with pytest.raises(UserError, match=r"were made anew since it was begun; start over with --fresh"):
            folder.require_the_same_inputs(changed)
    monkeypatch.setenv("RECALIGN_RESUME_ANYWAY", "1")
    folder.require_the_same_inputs({"data": "2"})
    monkeypatch.delenv("RECALIGN_RESUME_ANYWAY")
    folder.require_the_same_inputs({"data": "2"})
    assert folder.inputs() == {"data": "2", "model": "a"}


def test_a_run_folder_may_be_a_link_that_leads_nowhere_yet(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "scratch")
    RunFolder(tmp_path / "run").claim(Outer())
    assert (tmp_path / "scratch" / "config.yaml").exists()


def test_attempts_count_from_their_start_to_their_last_line(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")
    assert folder.worked_s("begun") == 0.0
    first, second = [("attempt", 0), ("begun", 5), ("step", 15)], [("attempt", 100), ("begun", 101), ("step", 104)]
    for event, at in [*first, *second, ("begun", 200)]:
        monkeypatch.setattr(time, "time", lambda at=at: float(at))
        folder.log(event)
    assert folder.worked_s("attempt", "begun") == 10.0 + 3.0


def test_the_recipe_of_a_run_means_the_folder_that_it_lies_in_whatever_its_name(tmp_path):
    for name in ("a #b", "2024", "x: y", "[z"):
        RunFolder(tmp_path / name).claim(Outer(run=Path("elsewhere")))
        path = tmp_path / name / "config.yaml"
        assert config.load(Outer, path, run_override(path)).run == tmp_path / name
    (tmp_path / "recipe.yaml").write_text("run: elsewhere\n")
    assert run_override(tmp_path / "recipe.yaml") == []


def test_a_figure_that_is_none_is_null_in_the_result(tmp_path):
    folder = RunFolder(tmp_path / "run")
    written = folder.write_result("test", "hash", {}, [{"x": math.nan, "y": (math.inf, 1)}], 1.0, more={"z": -math.inf})
    text = (folder.path / "result.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == written
    assert (written["rows"], written["more"]) == ([{"x": None, "y": [None, 1]}], {"z": None})


def test_a_metrics_line_that_a_full_disk_cut_spoils_no_other(tmp_path, monkeypatch):
    run, write = RunFolder(tmp_path), os.write
    run.log("first", step=1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:9]))
        with pytest.raises(OSError, match="No space left"):
            run.log("second", step=2)
    run.log("third", step=3)
    assert [row["event"] for row in run.events()] == ["first", "third"]


def test_a_metrics_line_cut_by_a_kill_is_left_out_and_a_repeated_step_counts_once(tmp_path):
    run = RunFolder(tmp_path)
    run.log("train", step=0, loss=3.0)
    run.log("train", step=1, loss=2.0)
    run.log("train", step=1, loss=1.5)
    with (tmp_path / METRICS).open("a") as stream:
        stream.write('{"event": "train", "st')
    assert [row["loss"] for row in run.steps("train")] == [3.0, 1.5]
    rows, offset = run.events_from(0)
    assert len(rows) == 3
    assert run.events_from(offset) == ([], offset)


def _append(path: Path) -> None:
    for nth in range(50):
        RunFolder(path).log("line", nth=nth)


def test_lines_of_two_processes_never_lie_over_each_other_where_appending_is_not_atomic(tmp_path, monkeypatch):
    """As on NFS, where the end of a file is looked up before it is written to; under the lock nobody else does."""
    opened = os.open

    def appending_nfs_way(path, flags, *mode):
        return opened(path, flags & ~os.O_APPEND, *mode)

    written = os.write

    def at_the_end(descriptor, line):
        os.lseek(descriptor, 0, os.SEEK_END)
        time.sleep(0.0005)
        return written(descriptor, line)

    monkeypatch.setattr(os, "open", appending_nfs_way)
    monkeypatch.setattr(os, "write", at_the_end)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(row["nth"] for row in RunFolder(tmp_path).events()) == sorted([*range(50)] * 2)


def test_two_writers_of_one_name_never_share_a_temporary_file(tmp_path):
    assert files.beside(tmp_path / "x") != files.beside(tmp_path / "x")


def _hold(path: Path, held, release) -> None:
    with RunFolder(path).lock("trainer"):
        held.set()
        release.wait(20)


def test_a_second_job_on_one_run_folder_is_refused_until_the_first_is_dead(tmp_path):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    owner = context.Process(target=_hold, args=(tmp_path, held, release))
    owner.start()
    assert held.wait(60)
    with (
        pytest.raises(UserError, match=rf"its trainer runs as process {owner.pid} on "),
        RunFolder(tmp_path).lock("trainer"),
    ):
        pass
    owner.kill()
    owner.join()
    with RunFolder(tmp_path).lock("trainer"):
        pass


# --- checkpoints ---


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, {"weights": torch.full((3,), float(step))}, {"config_hash": "abc"})


def test_the_newest_checkpoint_comes_back_with_its_random_generators(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.resume() is None
    save(checkpoints, 1)
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    save(checkpoints, 2)
    expected = torch.rand(2), np.random.rand(), random.random()
    checkpoint, state = Checkpoints(tmp_path).resume({"config_hash": "abc"})
    assert checkpoint.step == 2
    assert state["weights"].tolist() == [2.0, 2.0, 2.0]
    found = torch.rand(2), np.random.rand(), random.random()
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


STAGES = ["torch.save", "describe_files", "write_json", "fsync", "rename"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_kill_in_any_stage_of_a_save_leaves_the_previous_checkpoint(tmp_path, monkeypatch, stage):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)

    def killed(*_args, **_kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        target = {"torch.save": torch, "rename": Path}.get(stage, files)
        patch.setattr(target, stage.removeprefix("torch."), killed)
        with pytest.raises(KeyboardInterrupt):
            save(checkpoints, 2)
    assert Checkpoints(tmp_path).newest().step == 1
    save(checkpoints, 2)
    assert Checkpoints(tmp_path).newest().step == 2


@pytest.mark.parametrize("damage", ["truncate", "delete", "no manifest", "foreign manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, caplog, damage):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    state, manifest = tmp_path / "step-2" / "rank-0.pt", tmp_path / "step-2" / "manifest.json"
    if damage == "truncate":
        state.write_bytes(state.read_bytes()[:-1])
    elif damage == "delete":
        state.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("[1, 2]")
    with caplog.at_level(logging.WARNING):
        assert checkpoints.newest().step == 1
    assert "step-2" in caplog.text


def test_a_damaged_checkpoint_of_a_higher_step_never_costs_the_whole_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 10)
    (tmp_path / "step-10" / "manifest.json").unlink()
    assert checkpoints.newest() is None
    save(checkpoints, 5)
    assert Checkpoints(tmp_path, keep_last=1).newest().step == 5


def test_the_old_checkpoint_outlives_the_writing_of_the_new_one(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    save(checkpoints, 1)
    during = []
    checkpoints.save(2, {}, write=lambda folder: during.append((tmp_path / "step-1" / "manifest.json").exists()))
    assert during == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


def test_a_checkpoint_of_another_recipe_or_world_is_refused(tmp_path):
    save(Checkpoints(tmp_path), 1)
    with pytest.raises(UserError, match="another config hash"):
        Checkpoints(tmp_path).resume({"config_hash": "xyz"})
    two = Checkpoints(tmp_path, Ranks(rank=0, size=2))
    two.ranks = type("Two", (Ranks,), {"broadcast": lambda self, value: value, "gather": lambda self, value: [value]})(
        0, 2
    )
    with pytest.raises(UserError, match="written by 1 processes, this job has 2"):
        two.resume()


def test_a_checkpoint_holds_no_pickled_objects(tmp_path):
    """weights_only refuses anything but tensors and plain values, so loading runs nobody's code."""
    Checkpoints(tmp_path).save(1, {"bad": Path("x")})
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        Checkpoints(tmp_path).resume()


def test_a_key_may_be_called_on_and_numbers_may_have_exponents(tmp_path):
    """YAML 1.1 would read ``on`` as true and 1e-3 as a word."""
    (tmp_path / "recipe.yaml").write_text(
        "rec:\n  train: {on: train+valid, lr: 1e-3, epochs: 7, compile: true}\nyes: no\n"
    )
    read = config.read_recipe(tmp_path / "recipe.yaml")
    assert read == {"rec": {"train": {"on": "train+valid", "lr": 0.001, "epochs": 7, "compile": True}}, "yes": "no"}
    assert config.apply_overrides({}, ["a.on=3e4", "a.b=-.5", "a.c=off"]) == {
        "a": {"on": 30000.0, "b": -0.5, "c": "off"}
    }


@pytest.mark.parametrize(
    ("number", "ends"), [(errno.ENOSPC, 2), (errno.EACCES, 2), (errno.EROFS, 2), (errno.EIO, None)]
)
def test_a_disk_that_cannot_be_written_is_one_line_and_any_other_failure_a_traceback(number, ends, capsys):
    def fail() -> None:
        raise OSError(number, os.strerror(number), "runs/x/file")

    with pytest.raises(SystemExit if ends else OSError) as caught:
        run_main(fail)
    if ends:
        assert caught.value.code == ends
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line == f"error: runs/x/file: {os.strerror(number)}; once that is mended, start the same command again"


@pytest.mark.parametrize(("free", "raised"), [(0, OSError), (2**30, RuntimeError)])
def test_a_checkpoint_that_torch_could_not_write_says_whether_the_disk_is_full(tmp_path, monkeypatch, free, raised):
    """torch.save on a full disk raises a RuntimeError about its archive."""

    def full(*_: object) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 2**40 - free, free))
    with pytest.raises(raised) as caught:
        Checkpoints(tmp_path).save(1, {})
    if raised is OSError:
        assert caught.value.errno == errno.ENOSPC
    assert Checkpoints(tmp_path).newest() is None


def test_where_nothing_can_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a folder; name a file"):
        files.require_writable(tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        files.require_writable(tmp_path / "file" / "vectors.safetensors")
    files.require_writable(tmp_path / "new" / "vectors.safetensors")
    assert (tmp_path / "new").is_dir()
