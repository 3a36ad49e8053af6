"""Snapshot store and sample log: whole or absent, in order, never overwritten."""

import json
import logging
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


def test_a_half_written_batch_is_invisible(tmp_path, monkeypatch):
    log = SampleLog(tmp_path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        log.append(0, [SAMPLE])
    assert log.next_step() == 0


def test_a_deleted_batch_is_written_again(tmp_path):
    log = SampleLog(tmp_path)
    for step in range(3):
        log.append(step, [SAMPLE])
    (tmp_path / "batch-00000001.parquet").unlink()
    assert log.next_step() == 1


def test_waiting_for_a_batch_ends_and_names_it(tmp_path):
    with pytest.raises(TimeoutError, match=r"batch-00000007\.parquet"):
        SampleLog(tmp_path).wait(7, timeout_s=0.05)


def test_a_damaged_or_foreign_batch_is_named(tmp_path):
    log = SampleLog(tmp_path)
    log.append(0, [SAMPLE])
    path = next(tmp_path.glob("batch-*"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"batch-00000000\.parquet is damaged .*: bring back the file"):
        log.read(0)


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
