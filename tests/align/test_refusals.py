"""What neither job goes on with: samples of a wrong age, rewards that are no numbers, snapshots that do not come."""

import itertools
import time
from dataclasses import replace
from pathlib import Path

import pytest

from align.config import MainJob
from align.figures import Arrivals
from align.generator import Generator
from align.order import Turns
from align.samples import Sample, SampleLog, Text
from align.snapshots import LLM, RECOMMENDER, Snapshot, SnapshotStore
from align.trainer import Trainer
from align.transfer import TransferFailed
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import StopFile

SAMPLE = Sample(
    7, 0, [1, 2], 1, True, True, [1], [[1]], [[Text(0, [1], [-0.5], "x")]], [], [-1.0], -2.0, version=2, version_step=20
)


def job(run: Path, **align: object) -> MainJob:
    return build(MainJob, {"data": "x", "run": str(run), "align": {"refresh_every": 10, "max_lag_steps": 20, **align}})


@pytest.mark.parametrize(
    ("align", "message"),
    [
        ({"finish": {"on": "train+valid"}}, "align.finish.on is train\\+valid, rec.train.on is train"),
        ({"trainer": {"keep_snapshots": 3}}, "keep_snapshots 3 is below 4: the trainer could delete"),
        ({"objective": {"max_importance": 0.5}}, "max_importance"),
        ({"finish": {"tune": "items"}}, "finish.start and tune have no meaning with finish_from=aligned"),
    ],
)
def test_a_last_training_that_would_not_be_what_it_says_is_refused(tmp_path, align, message):
    with pytest.raises(UserError, match=message):
        job(tmp_path, **align)


@pytest.mark.parametrize("rec", [{"items": {"kind": "vectors", "file": "x"}}, {"train": {"start": "runs/x"}}])
def test_recommenders_that_would_not_begin_alike_are_refused(tmp_path, rec):
    with pytest.raises(UserError, match=r"rec\.items and rec\.train\.start are for 'recalign train'"):
        build(MainJob, {"data": "x", "run": str(tmp_path), "rec": rec})


@pytest.fixture
def trainer(tmp_path) -> Trainer:
    """As far as it is before it asks its models anything."""
    trainer = Trainer.__new__(Trainer)
    trainer.job, trainer.ranks, trainer.log = job(tmp_path), Ranks(), SampleLog(tmp_path / "samples")
    trainer.arrivals = Arrivals()
    return trainer


@pytest.mark.parametrize(
    ("version_step", "error", "message"),
    [
        (10, RuntimeError, "step 31 got a sample 21 steps old, the bound is 20"),
        (40, UserError, r"batch-00000031\.parquet is by weights of step 40, which did not exist yet"),
    ],
)
def test_a_sample_of_a_wrong_age_is_not_trained_on(trainer, version_step, error, message):
    trainer.log.append(31, [SAMPLE, replace(SAMPLE, version_step=version_step)])
    with pytest.raises(error, match=message):
        trainer._update(31)


@pytest.mark.parametrize("log_p", [float("nan"), 200.0])
def test_a_reward_that_is_no_number_names_its_sample_before_anything_is_trained(trainer, log_p):
    trainer.log.append(25, [SAMPLE, replace(SAMPLE, ordinal=8, log_p_y_given_xs=[log_p])])
    with pytest.raises(UserError, match=r"the reward of sample 8 in .*batch-00000025\.parquet is \[(nan|inf)\]"):
        trainer._update(25)


def test_a_reward_that_is_no_number_is_named_though_a_baseline_spreads_it(tmp_path, trainer):
    trainer.job = job(tmp_path, objective={"baseline": "leave-one-out"})
    trainer.log.append(25, [SAMPLE, replace(SAMPLE, ordinal=8, log_p_y_given_xs=[800.0])])
    with pytest.raises(UserError, match="the reward of sample 8 in"):
        trainer._update(25)


@pytest.fixture
def generator(tmp_path) -> Generator:
    generator = Generator.__new__(Generator)
    generator.job, generator.turns = job(tmp_path, wait_timeout_s=0.05), Turns(0, 1, 4)
    generator.store, generator.log = SnapshotStore(tmp_path / "snapshots"), SampleLog(tmp_path / "samples")
    generator.stop, generator.snapshot, generator.run = StopFile(tmp_path), None, RunFolder(tmp_path)
    return generator


def test_waiting_for_a_snapshot_ends_and_says_which_would_do(generator):
    with pytest.raises(TimeoutError, match=r"waited 0 s, .* nothing, for a snapshot of step 0 or later in .*snapshots"):
        generator._refresh(3)
    generator.snapshot = Snapshot(Path("v1"), 1, 10, [], [])
    assert generator._refresh(30) >= 0
    with pytest.raises(TimeoutError, match=r"waited 0 s, .*, for a snapshot of step 11 or later"):
        generator._refresh(31)


def test_a_trainer_that_gets_on_is_waited_for_however_slow_it_is(generator, monkeypatch):
    looks = itertools.count()
    monkeypatch.setattr(generator.run, "last_logged", lambda: min(next(looks), 20))
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match="in which the trainer logged nothing"):
        generator._refresh(3)
    assert time.monotonic() - begin > 0.3  # several times the timeout


def test_weights_that_do_not_come_are_no_progress(generator, monkeypatch):
    def fail(snapshot):
        time.sleep(0.02)
        raise TransferFailed("the trainer did not come")

    monkeypatch.setattr(generator, "_load_llm", fail)
    monkeypatch.setattr(generator, "_newer", lambda: Snapshot(Path("v1"), 1, 10, [], []))
    with pytest.raises(TimeoutError, match="for a snapshot of step 0 or later"):
        generator._refresh(3)


def write_nothing_but_a_recommender(folder: Path) -> None:
    (folder / RECOMMENDER).mkdir()


def test_weights_that_nobody_holds_are_not_waited_for_where_files_would_do(generator):
    """A run that went from files to memory, whose trainer died before it could give the newest."""

    def write(folder: Path) -> None:
        write_nothing_but_a_recommender(folder)
        (folder / LLM).mkdir()

    generator.taker = None
    generator.store.publish(2, 20, write, [1], [])
    generator.store.publish(3, 30, write_nothing_but_a_recommender, [1], [], whole=False)
    assert generator._newer().version == 2
    generator.snapshot = generator.store.get(2)
    assert generator._newer() is None


def test_what_was_said_is_read_once_and_of_the_same_weights_alone(generator, monkeypatch):
    generator.newest, generator.snapshot = {}, Snapshot(Path("v2"), 2, 20, [], [])
    said = replace(SAMPLE, version=2, version_step=20)
    generator.log.append(20, [said])
    generator.log.append(
        21, [replace(said, version_step=15, draws=[[replace(said.draws[0][0], text="other weights")]])]
    )
    monkeypatch.setattr(generator.log, "next_step", lambda: 22)
    generator._remember_what_was_said()
    assert list(generator.newest.values()) == [said.draws[0][0].text]


def test_a_batch_that_is_gone_is_not_written_again_by_newer_weights(generator):
    generator.snapshot = Snapshot(Path("v1"), 1, 10, [], [])
    with pytest.raises(UserError, match=r"batch-00000009\.parquet is gone, and the newest weights, of step 10"):
        generator._refresh(9)
    assert generator._refresh(10) >= 0
