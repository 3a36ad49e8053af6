"""Snapshot store and sample log: whole or absent, in order, never overwritten."""

import errno
import json
import logging
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from align.generator import last_step_allowed
from align.samples import Other, Sample, SampleLog, Text
from align.snapshots import SnapshotStore
from rec.runtime import files
from rec.runtime.errors import UserError

SAMPLE = Sample(
    ordinal=3,
    user=1,
    items=[4, 5, 6],
    target=7,
    rewards=True,
    fits=False,
    places=[1, 2],
    prompts=[[1, 2], [3]],
    draws=[
        [Text(11, [8, 9], [-0.5, -0.25], "eight nine"), Text(12, [10], [-1.0], "")],
        [Text(13, [8], [-0.75], "eight"), Text(14, [], [], "")],
    ],
    others=[Other(0, "four"), Other(2, "")],
    log_p_y_given_xs=[-3.25, -3.0],
    log_p_y_given_x=-3.5,
    version=2,
    version_step=100,
)


def publish(store: SnapshotStore, version: int, content: str = "weights") -> None:
    def write(folder: Path) -> None:
        (folder / "llm").mkdir()
        (folder / "llm" / "model.safetensors").write_text(content)
        (folder / "recommender").mkdir()
        (folder / "recommender" / "model.safetensors").write_text("rec")

    store.publish(version, 50 * version, write, [1, 2, 3], [-0.1, -0.2])


def test_a_sample_comes_back_as_it_went_in(tmp_path):
    log = SampleLog(tmp_path / "samples")
    log.append(0, [SAMPLE, replace(SAMPLE, ordinal=4)])
    assert log.read(0) == [SAMPLE, replace(SAMPLE, ordinal=4)]
    assert log.next_step() == 1
    log.append(1, [SAMPLE])
    log.append(3, [SAMPLE])
    assert [log.ready_from(step) for step in range(5)] == [2, 1, 0, 1, 0]


def test_a_batch_is_never_replaced(tmp_path):
    log = SampleLog(tmp_path)
    log.append(0, [SAMPLE])
    log.append(0, [replace(SAMPLE, target=9)])
    assert log.read(0) == [SAMPLE]


@pytest.mark.parametrize("finished", [0, 1], ids=["before the checksum", "between the checksum and the batch"])
def test_a_half_written_batch_is_invisible_and_written_by_the_next(tmp_path, monkeypatch, finished):
    log, left, replace_file = SampleLog(tmp_path), iter(range(finished)), Path.replace

    def killed_after_some(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise OSError("killed")
        return replace_file(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed_after_some)
        with pytest.raises(OSError, match="killed"):
            log.append(0, [SAMPLE])
    assert log.next_step() == 0
    assert len(list(tmp_path.glob("batch-*"))) == finished
    other = replace(SAMPLE, target=9)
    log.append(0, [other])
    assert log.read(0) == [other]


def test_a_deleted_batch_is_written_again(tmp_path):
    log = SampleLog(tmp_path)
    for step in range(3):
        log.append(step, [SAMPLE])
    (tmp_path / "batch-00000001.parquet").unlink()
    assert log.next_step() == 1


def test_waiting_for_a_batch_ends_and_names_it(tmp_path):
    with pytest.raises(TimeoutError, match=r"batch-00000007\.parquet"):
        SampleLog(tmp_path).wait(7, timeout_s=0.05)


def test_no_flipped_bit_is_trained_on(tmp_path):
    """Every byte of a batch, by one bit: none may come back as samples, nor as anything but one line."""
    log = SampleLog(tmp_path)
    log.append(0, [SAMPLE])
    path = log.path_of(0)
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        with pytest.raises(UserError, match=r"batch-00000000\.parquet is damaged, it does not match"):
            log.read(0)
    path.write_bytes(whole)
    assert log.read(0) == [SAMPLE]


@pytest.mark.parametrize("damage", ["cut short", "emptied", "another file", "no checksum", "another checksum"])
def test_a_damaged_batch_is_named(tmp_path, damage):
    log = SampleLog(tmp_path)
    log.append(0, [SAMPLE])
    log.append(1, [replace(SAMPLE, ordinal=4)])
    path, checksum = log.path_of(0), tmp_path / "batch-00000000.sha256"
    if damage == "no checksum":
        checksum.unlink()
    elif damage == "another checksum":
        checksum.write_text("0" * 64)
    else:
        contents = {"cut short": path.read_bytes()[:-20], "emptied": b"", "another file": log.path_of(1).read_bytes()}
        path.write_bytes(contents[damage])
    with pytest.raises(UserError, match=r"batch-00000000\.parquet is damaged"):
        log.read(0)
    with pytest.raises(FileNotFoundError):
        log.read(2)


@pytest.fixture
def locked_folder(tmp_path):
    """A folder that nobody may write to: or for root, one below a file, where nothing can be."""
    folder = tmp_path / "locked"
    if os.geteuid() == 0:
        folder.write_text("a file, where a folder should be")
        yield folder / "below"
        return
    folder.mkdir(mode=0o500)
    yield folder
    folder.chmod(0o700)


def test_a_batch_that_may_not_be_read_is_not_called_damaged(tmp_path):
    log = SampleLog(tmp_path)
    log.path_of(0).mkdir()  # what even root cannot read as a file
    with pytest.raises(UserError, match=r"batch-00000000\.parquet cannot be read: .*directory"):
        log.read(0)


def test_a_place_that_cannot_be_written_to_is_named(locked_folder):
    with pytest.raises(OSError, match="locked"):
        SampleLog(locked_folder).append(0, [SAMPLE])
    with pytest.raises(OSError, match="locked"):
        publish(SnapshotStore(locked_folder), 0)


@pytest.fixture
def almost_full(tmp_path):
    """A file system with 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named_and_what_was_there_stays(almost_full):
    log, store = SampleLog(almost_full / "samples"), SnapshotStore(almost_full / "snapshots")
    log.append(0, [SAMPLE])
    publish(store, 0)
    with pytest.raises(OSError, match="No space left"):
        log.append(1, [replace(SAMPLE, draws=[[Text(nth, [1] * 9, [-0.5] * 9, f"{nth**5}") for nth in range(4000)]])])
    with pytest.raises(OSError, match="No space left"):
        publish(store, 1, "w" * 2**17)
    assert (log.next_step(), log.read(0)) == (1, [SAMPLE])
    assert store.newest().version == 0


def test_the_newest_complete_snapshot_is_offered(tmp_path):
    store = SnapshotStore(tmp_path)
    assert store.newest() is None
    publish(store, 0)
    publish(store, 1)
    newest = store.newest()
    assert (newest.version, newest.step, newest.canary_tokens) == (1, 50, [1, 2, 3])
    assert store.newest(after=1) is None


@pytest.mark.parametrize(
    "damage", ["no manifest", "missing tensor file", "truncated", "same size, other bytes", "garbage"]
)
def test_a_broken_snapshot_is_ignored_with_one_warning(tmp_path, caplog, damage):
    store = SnapshotStore(tmp_path)
    publish(store, 0)
    publish(store, 1)
    weights = tmp_path / "v000001" / "llm" / "model.safetensors"
    if damage == "no manifest":
        (tmp_path / "v000001" / "manifest.json").unlink()
    elif damage == "garbage":
        (tmp_path / "v000001" / "manifest.json").write_text('{"half": ')
    elif damage == "missing tensor file":
        weights.unlink()
    else:
        weights.write_text("wei" if damage == "truncated" else "WEIGHTS")
    with caplog.at_level(logging.WARNING):
        assert store.newest().version == 0
        assert store.newest().version == 0
    assert [record.message for record in caplog.records if "v000001" in record.message] == [caplog.records[0].message]
    publish(store, 1)
    assert store.newest().version == 1


def test_a_kill_while_publishing_leaves_the_previous_snapshot(tmp_path):
    store = SnapshotStore(tmp_path)
    publish(store, 0)

    def killed_half_way(folder: Path) -> None:
        (folder / "llm").mkdir()
        (folder / "llm" / "model.safetensors").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.publish(1, 50, killed_half_way, [], [])
    assert store.newest().version == 0
    publish(store, 1)
    assert store.newest().version == 1


def test_a_version_is_never_overwritten(tmp_path):
    store = SnapshotStore(tmp_path)
    publish(store, 0, "first")
    publish(store, 0, "second")
    assert (tmp_path / "v000000" / "llm" / "model.safetensors").read_text() == "first"


def test_a_version_of_another_step_is_not_taken_for_this_one(tmp_path):
    store = SnapshotStore(tmp_path)
    publish(store, 1)
    with pytest.raises(UserError, match=r"v000001 is of step 50, not 60"):
        store.publish(1, 60, lambda folder: None, [], [])


def test_a_snapshot_without_an_llm_may_be_published_again_and_a_whole_one_may_not(tmp_path):
    store = SnapshotStore(tmp_path)

    def recommender(folder: Path) -> None:
        (folder / "recommender").mkdir()
        (folder / "recommender" / "model.safetensors").write_text("weights")

    publish(store, 0)
    store.publish(1, 50, recommender, [1], [], whole=False)
    assert (store.newest().version, store.newest().whole) == (1, False)
    assert store.newest(whole=True).version == 0
    assert store.holds(1, 50, whole=False)
    assert not store.holds(1, 50)
    store.publish(1, 40, recommender, [1], [], whole=False)  # a trainer that goes on from step 40 has nothing of 50
    assert store.newest().step == 40
    publish(store, 1)
    assert (store.newest().step, store.newest().whole) == (50, True)
    store.publish(1, 50, recommender, [1], [], whole=False)
    assert store.newest().whole
    with pytest.raises(UserError, match=r"v000001 is of step 50, not 40"):
        store.publish(1, 40, recommender, [1], [], whole=False)


def test_a_snapshot_without_an_llm_goes_with_the_weights_that_its_trainer_has(tmp_path):
    """A trainer that was started again may compute other bits; its weights and an older recommender are no pair."""
    store = SnapshotStore(tmp_path)

    def recommender(weights: str):
        def write(folder: Path) -> None:
            (folder / "recommender").mkdir()
            (folder / "recommender" / "model.safetensors").write_text(weights)

        return write

    store.publish(3, 150, recommender("first"), [1, 2], [-0.5], whole=False)
    store.publish(3, 150, recommender("the same again"), [1, 2], [-0.5], whole=False)
    assert (store.newest().recommender / "model.safetensors").read_text() == "first"
    store.publish(3, 150, recommender("others"), [1, 2], [-0.9], whole=False)
    assert store.newest().canary_logprobs == [-0.9]
    assert (store.newest().recommender / "model.safetensors").read_text() == "others"


def test_broken_snapshots_do_not_take_the_place_of_whole_ones(tmp_path):
    store = SnapshotStore(tmp_path, keep_last=2)
    publish(store, 0)
    publish(store, 1)
    for version in (2, 3):
        publish(store, version)
        (tmp_path / f"v{version:06d}" / "llm" / "model.safetensors").write_text("rotten")
    publish(SnapshotStore(tmp_path, keep_last=2), 4)
    assert store.newest().version == 4
    shutil.rmtree(tmp_path / "v000004")
    assert store.newest().version == 1
    publish(store, 5)
    publish(store, 6)
    assert store.versions() == [6, 5]


def test_a_broken_snapshot_is_hashed_once_however_long_somebody_waits(tmp_path, monkeypatch):
    store, hashed = SnapshotStore(tmp_path), []
    publish(store, 0)
    publish(store, 1)
    weights = tmp_path / "v000001" / "llm" / "model.safetensors"
    weights.write_text("WEIGHTS")
    sha256_file = files.sha256_file
    monkeypatch.setattr(files, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    for _ in range(5):
        assert store.newest(after=0) is None
    assert hashed == [weights]
    weights.write_text("weights")  # mended
    assert store.newest(after=0).version == 1


def test_a_snapshot_that_could_not_be_read_for_a_moment_is_looked_at_again(tmp_path, monkeypatch):
    store = SnapshotStore(tmp_path)
    publish(store, 0)

    def fail(path: Path) -> str:
        raise OSError(errno.EIO, "Input/output error", str(path))

    another = SnapshotStore(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(files, "sha256_file", fail)
        assert another.newest() is None
    assert another.newest().version == 0


def test_old_snapshots_go_after_the_new_one_is_there(tmp_path):
    store = SnapshotStore(tmp_path, keep_last=2)
    for version in range(5):
        publish(store, version)
    assert store.versions() == [4, 3]


def test_another_schema_version_is_not_guessed_at(tmp_path):
    store = SnapshotStore(tmp_path)
    publish(store, 0)
    path = tmp_path / "v000000" / "manifest.json"
    files.write_json(path, json.loads(path.read_text()) | {"schema_version": 99})
    assert store.newest() is None


def test_the_staleness_bound_is_in_trainer_steps():
    assert last_step_allowed(snapshot_step=50, max_lag_steps=100) == 150
