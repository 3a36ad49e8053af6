"""A kill after every single thing that a save does to the disk, and what pruning may and may not delete."""

import contextlib
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from rec.runtime import checkpoint as checkpoint_module
from rec.runtime import runfolder
from rec.runtime.checkpoint import Checkpoints, _merged, _wait_until_seen, restore_rng, rng_state
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
    rare = Checkpoints(tmp_path / "rare", keep_last=1, keep_every=10)
    for step in range(7, 50, 7):  # never at a multiple of ten: the next one after it
        save(rare, step)
    assert [found.step for found in rare.examine()] == [49, 42, 35, 21, 14]


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


def test_damage_that_leaves_every_size_is_found_before_anything_is_resumed(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    save(checkpoints, 2)
    path = tmp_path / "step-2" / "rank-0.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    checkpoint, state = checkpoints.resume()
    assert checkpoint.step == 1
    assert state["weights"].unique().tolist() == [1.0]
    assert "ignoring checkpoint" in caplog.text
    assert "rank-0.pt does not match its checksums" in caplog.text
    # Whoever trains step 2 again saves it again.
    assert not checkpoints.holds(2)
    assert checkpoints.holds(1)
    path.write_bytes(bytes(len(content)))
    assert "rank-0.pt cannot be read" in checkpoints.newest().damage()


def test_a_flipped_byte_in_an_archives_tables_is_named_or_can_be_loaded(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    save(checkpoints, 1)
    path = tmp_path / "step-1" / "rank-0.pt"
    whole = path.read_bytes()
    found = set()
    for place in [*range(0, 400, 3), *range(len(whole) - 1200, len(whole), 3)]:  # where the archive's tables lie
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        problem = checkpoints.newest().damage()
        found.add(problem is None)
        if problem is None:
            assert checkpoints.newest().state(0)["state"]["weights"].shape == (300,)
    assert found == {True, False}


def test_a_manifest_without_the_file_of_a_rank_is_none(tmp_path):
    save(Checkpoints(tmp_path), 1)
    manifest = tmp_path / "step-1" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"world_size": 1', '"world_size": 2'))
    [found] = Checkpoints(tmp_path).examine()
    assert found.problem == "manifest.json does not list rank-1.pt"


def test_damaged_checkpoints_never_push_whole_ones_out(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in (1, 2):
        save(checkpoints, step)
    (tmp_path / "step-9").mkdir()
    save(checkpoints, 3)
    assert [found.step for found in checkpoints.examine()] == [9, 3, 2]
    (tmp_path / "step-2" / "one").unlink()
    save(checkpoints, 4)
    assert [found.step for found in checkpoints.examine()] == [9, 4, 3]


def test_what_another_node_wrote_is_waited_for_as_who_wrote_it_sees_it(tmp_path, monkeypatch):
    """A file that is listed short at first, and one that is not listed at all, as on NFS."""
    own, others = {"a": {"bytes": 3}, "b": {"bytes": 1}}, {"b": {"bytes": 4}, "c": {"bytes": 2}}
    written = _merged([own, others])
    assert written == {"a": {"bytes": 3}, "b": {"bytes": 4}, "c": {"bytes": 2}}
    for name, content in (("a", b"aaa"), ("b", b"b")):
        (tmp_path / name).write_bytes(content)
    shown = {"b": b"bbbb", "c": b"cc"}

    def show_one(_seconds):
        name, content = shown.popitem()
        (tmp_path / name).write_bytes(content)

    monkeypatch.setattr(time, "sleep", show_one)
    _wait_until_seen(tmp_path, written)
    assert not shown
    monkeypatch.setattr(checkpoint_module, "SEEN_WITHIN_S", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    (tmp_path / "c").unlink()
    with pytest.raises(OSError, match="c is missing here after 0 s, and another node wrote it"):
        _wait_until_seen(tmp_path, written)


def test_the_random_state_is_that_of_one_gpu_and_fewer_may_be_there_when_it_goes_on(monkeypatch):
    restored = []
    for name in ("is_available", "is_initialized"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    restore_rng(rng_state())
    assert restored == [torch.tensor([7])]


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

    def gather(self, value):
        return [value]


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


def test_a_lock_of_the_same_slurm_job_is_that_of_its_last_attempt_and_waited_for(tmp_path, monkeypatch):
    """Its node died, and the file server gives the lock back only when the lease is over."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    held = contextlib.ExitStack()
    held.enter_context(RunFolder(tmp_path).lock("trainer"))
    waited = []

    def lease_ends(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            held.close()

    monkeypatch.setattr(time, "sleep", lease_ends)
    with RunFolder(tmp_path).lock("trainer"):
        assert len(waited) == 3
        monkeypatch.setattr(runfolder, "DEAD_NODE_S", 0.0)
        with pytest.raises(UserError, match="in SLURM job 4711"), RunFolder(tmp_path).lock("trainer"):
            pass


def test_a_lock_names_its_owners_slurm_job(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    with RunFolder(tmp_path).lock("trainer"):
        monkeypatch.setenv("SLURM_JOB_ID", "4712")
        said = rf"its trainer runs as process {os.getpid()} on .* in SLURM job 4711"
        with pytest.raises(UserError, match=said), RunFolder(tmp_path).lock("trainer"):
            pass
    with RunFolder(tmp_path).lock("trainer"):
        pass
    assert not (tmp_path / CONFIG).exists()
