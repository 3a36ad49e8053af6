"""A kill after every single thing that a save does to the disk, and what pruning may and may not delete."""

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from rec.runtime.checkpoint import Checkpoints
from rec.runtime.errors import RESUME_ANYWAY, UserError
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import CONFIG, RunFolder

TOUCHES_THE_DISK = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")


def save(checkpoints: Checkpoints, step: int) -> None:
    def write(folder: Path) -> None:
        for name in ("one", "two"):
            (folder / name).write_bytes(bytes(100))

    checkpoints.save(step, {"weights": torch.full((300,), float(step))}, {"config_hash": "abc"}, write)


def killed_at(folder: Path, nth: int) -> bool:
    """Save step 2 in a process of its own that is killed before its ``nth`` operation; False if there is none."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        if event in TOUCHES_THE_DISK and str(folder) in str(arguments[0]):
            count += 1
            if count == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    save(Checkpoints(folder, keep_last=1), 2)
    os._exit(0)


def test_a_kill_before_every_operation_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    found = []
    for nth in range(1, 1000):
        folder = tmp_path / str(nth)
        save(Checkpoints(folder), 1)
        was_killed = killed_at(folder, nth)
        checkpoint, state = Checkpoints(folder).resume()
        assert state["weights"].unique().tolist() == [checkpoint.step]
        found.append(checkpoint.step)
        save(Checkpoints(folder, keep_last=1), 3)
        assert [path.name for path in folder.iterdir()] == ["step-3"], "what a kill left behind is in the way"
        if not was_killed:
            break
    assert not was_killed
    # The previous one until the new one is in place, the new one from then on; and many places to be killed in.
    assert found == sorted(found)
    assert set(found) == {1, 2}
    assert found.count(1) > 10
    assert found.count(2) > 3


def test_checkpoints_of_every_nth_step_are_kept_for_good(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_every=10)
    for step in range(2, 26, 2):
        save(checkpoints, step)
    assert [found.step for found in checkpoints.examine()] == [24, 22, 20, 10]
    for step in (26, 28, 30, 32):
        save(checkpoints, step)
    assert [found.step for found in checkpoints.examine()] == [32, 30, 28, 20, 10]


def test_what_is_named_like_a_checkpoint_and_is_none_is_named_with_its_reason(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=9)
    for step in (1, 2, 3):
        save(checkpoints, step)
    (tmp_path / "step-2" / "two").write_bytes(b"short")
    (tmp_path / "step-3" / "rank-0.pt").unlink()
    save(checkpoints, 6)
    manifest = tmp_path / "step-6" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"schema_version": 2', '"schema_version": 1'))
    (tmp_path / "step-4").mkdir()
    (tmp_path / "step-4" / "holiday.jpg").write_bytes(b"foreign")
    (tmp_path / "step-5").write_text("a file")
    (tmp_path / "step-x").mkdir()
    found = {finding.step: finding.problem for finding in checkpoints.examine()}
    assert list(found) == [6, 5, 4, 3, 2, 1]
    assert found[6] == "schema version 1, this program reads 2"
    assert found[1] is None
    assert found[2] == "two has 5 bytes, not 100"
    assert found[3] == "rank-0.pt is missing"
    assert "no readable manifest.json" in found[4]
    assert "no readable manifest.json" in found[5]
    assert checkpoints.newest().step == 1
    assert checkpoints.holds(1)
    assert not checkpoints.holds(3)


def test_another_recipe_or_data_set_is_refused_unless_told(tmp_path, monkeypatch, caplog):
    save(Checkpoints(tmp_path), 1)
    with pytest.raises(UserError, match=r"another config hash \(abc, now xyz\).*--resume-anyway"):
        Checkpoints(tmp_path).resume({"config_hash": "xyz"})
    monkeypatch.setenv(RESUME_ANYWAY, "1")
    assert Checkpoints(tmp_path).resume({"config_hash": "xyz"})[0].step == 1
    assert "going on all the same" in caplog.text


class Alone(Ranks):
    """One of several ranks, without the others: it finds out for itself what rank 0 would tell it."""

    is_first = True

    def broadcast(self, value):
        return value


def test_a_state_that_all_ranks_share_may_go_on_on_any_number_of_them(tmp_path):
    save(Checkpoints(tmp_path), 1)
    drawn = []
    for rank in (0, 1, 0):
        checkpoint, state = Checkpoints(tmp_path, Alone(rank, 3)).resume(replicated=True)
        assert checkpoint.world_size == 1
        assert state["weights"].unique().tolist() == [1.0]
        drawn.append(torch.rand(1).item())
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
    with pytest.raises(UserError, match="written by 1 processes, this job has 3"):
        Checkpoints(tmp_path, Alone(1, 3)).resume()


def test_a_lock_names_its_owners_slurm_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with (
        RunFolder(tmp_path).lock("trainer"),
        pytest.raises(UserError, match=rf"its trainer runs as process {os.getpid()} on .* in SLURM job 4711"),
        RunFolder(tmp_path).lock("trainer"),
    ):
        pass
    with RunFolder(tmp_path).lock("trainer"):
        pass
    assert not (tmp_path / CONFIG).exists()
