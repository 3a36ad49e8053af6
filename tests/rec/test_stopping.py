"""The stop file: every job saves and ends within a step, all ranks agree, and what goes on is the same run."""

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from rec import trainer
from rec.job import load_job, open_run
from rec.runtime import stopping
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import Section
from rec.runtime.errors import EXIT_TRY_AGAIN, LostContact, Stopped, UserError
from rec.runtime.ranks import Ranks, lost_contact_is_named, timeout
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import STOP, StopFile
from rec.train import run

ROOT = Path(__file__).parents[2]
SMALL = {
    "model": {"name": "SASRec", "dim": 16, "heads": 2, "blocks": 1, "max_length": 8, "dropout": 0.2},
    "train": {"lr": 5e-3, "batch_size": 8, "epochs": 4, "patience": 4, "checkpoint_every": 1},
}


@pytest.fixture
def recipe(small_data, tmp_path):
    def write(name: str, rec: dict = SMALL) -> Path:
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"data": str(small_data.folder), "run": str(tmp_path / name), "rec": rec}))
        return path

    return write


def same_run(one: Path, other: Path) -> None:
    """Weights and losses of two finished runs, bit for bit."""
    weights, others = (open_run(path).model.state_dict() for path in (one, other))
    assert all(torch.equal(value, others[name]) for name, value in weights.items())
    losses, others = ([row["loss"].hex() for row in RunFolder(path).steps("epoch")] for path in (one, other))
    assert losses == others


SHORT = {"lr": 5e-3, "batch_size": 16, "epochs": 2, "patience": 2, "checkpoint_every": 1}
# What draws random numbers of its own kind while it trains.
OTHERS = {
    "masked items": {"model": {"name": "BERT4Rec", "dim": 16, "blocks": 1, "max_length": 8}},
    "random prefixes": {
        "model": {"name": "LightSANs", "dim": 16, "blocks": 1, "max_length": 8},
        "train": {"prefixes_per_user": 3},
    },
    "negatives of BST": {"model": {"name": "BST", "dim": 16, "mlp": [8], "max_length": 8}},
    "negatives of LightGCN": {"model": {"name": "LightGCN", "dim": 8}, "train": {"batch_size": 128}},
    "a loss's negatives": {
        "model": {"name": "GRU4Rec", "dim": 16, "hidden": 8, "max_length": 8},
        "loss": {"name": "gbce", "negatives": 4, "sampling": "popularity", "shared": False},
    },
}


@pytest.mark.parametrize(
    ("rec", "step"),
    [
        *((SMALL, step) for step in (1, 4, 5, 7)),
        *(({**rec, "train": {**SHORT, **rec.get("train", {})}}, 4) for rec in OTHERS.values()),
    ],
    ids=["step 1", "step 4", "step 5", "step 7", *OTHERS],
)
def test_a_stop_in_the_middle_of_an_epoch_and_at_its_end_changes_nothing(recipe, monkeypatch, rec, step):
    """SASRec makes five steps an epoch: the first, the last but one and the last one, and one of the second epoch."""
    whole, stopped = load_job(recipe("whole", rec)), load_job(recipe("stopped", rec))
    run(whole, "")
    monkeypatch.setattr(stopping, "LOOK_EVERY_S", 0.0)
    taken = trainer._Step.__call__

    def touch_then_step(self, batch, state):
        if state.schedule.last_epoch == step - 1:
            (stopped.run / STOP).touch()
        return taken(self, batch, state)

    with monkeypatch.context() as patch:
        patch.setattr(trainer._Step, "__call__", touch_then_step)
        with pytest.raises(Stopped, match=rf"{STOP} asks for it: stopped in epoch .* after step {step};"):
            run(stopped, "")
        assert Checkpoints(stopped.run / "checkpoints").newest().step == step
        with pytest.raises(Stopped):  # the file is still there, and nobody has lost anything by trying
            run(stopped, "")
        assert Checkpoints(stopped.run / "checkpoints").newest().step == step + 1
    (stopped.run / STOP).unlink()
    torch.manual_seed(99)
    run(stopped, "")
    same_run(whole.run, stopped.run)


def test_a_stage_inside_a_run_is_stopped_by_the_runs_own_file(tmp_path):
    RunFolder(tmp_path / "run").claim(Section())
    stage = RunFolder(tmp_path / "run" / "without-reward-users" / "base")
    assert not StopFile(stage.path).seen()
    (tmp_path / "run" / STOP).touch()
    assert StopFile(stage.path).seen()
    assert not StopFile(tmp_path).seen()


def _ask(rank: int, folder: Path, answers) -> None:
    """Rank 1 sees the file at once, rank 0 only after three steps: a shared folder that is slow for one of them."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29733"}
    dist.init_process_group("gloo", rank=rank, world_size=2)
    own = folder / str(rank)
    own.mkdir()
    stop = StopFile(own, Ranks.current())
    if rank == 1:
        (own / STOP).touch()
    for step in range(6):
        if rank == 0 and step == 3:
            (own / STOP).touch()
            time.sleep(2 * stopping.LOOK_EVERY_S)
        answers.put((rank, step, stop.agreed()))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_that_see_the_file_at_different_times_stop_at_the_same_step(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=_ask, args=(rank, tmp_path, answers)) for rank in range(2)]
    for process in ranks:
        process.start()
    given = {(rank, step): answer for rank, step, answer in (answers.get(timeout=900) for _ in range(12))}
    for process in ranks:
        process.join(60)
    assert [given[0, step] for step in range(6)] == [False] * 3 + [True] * 3
    assert [given[1, step] for step in range(6)] == [given[0, step] for step in range(6)]


def launch(recipe: Path, processes: int) -> subprocess.Popen:
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "launch/accelerate/cpu.yaml"),
        "--num_processes", str(processes), "--main_process_port", "0",
        "-m", "rec.train", "--config", str(recipe), "rec.train.epochs=30", "rec.train.patience=30",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen) -> str:
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return said


@pytest.mark.distributed
def test_two_processes_stop_together_and_two_or_one_go_on(recipe):
    whole, stopped = recipe("whole"), recipe("stopped")
    finish(launch(whole, 2))
    folder = RunFolder(load_job(stopped).run)
    process = launch(stopped, 2)
    end = time.monotonic() + 120
    while len(folder.events("epoch")) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    (folder.path / STOP).touch()
    assert f"{STOP} asks for it" in finish(process)
    assert folder.result() is None
    checkpoint = next(Checkpoints(folder.path / "checkpoints").examine())
    assert checkpoint.checkpoint.world_size == 2
    (folder.path / STOP).unlink()
    alone = folder.path.parent / "alone"
    subprocess.run(["cp", "-r", folder.path, alone], check=True)

    finish(launch(stopped, 2))
    same_run(load_job(whole).run, folder.path)

    said = finish(launch(alone / "config.yaml", 1))
    assert "1 processes go on for 2" in said
    assert len(RunFolder(alone).steps("epoch")) == 30


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 15000ms for recv operation to complete", True),
        ("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:29500", True),
        ("NCCL communicator was aborted on rank 3. Watchdog caught collective operation timeout", True),
        ("mat1 and mat2 shapes cannot be multiplied (3x4 and 5x6)", False),
    ],
)
def test_only_the_loss_of_other_ranks_is_called_so(said, named):
    with pytest.raises(LostContact if named else RuntimeError) as caught, lost_contact_is_named():
        raise RuntimeError(said)
    assert ("Start the same command again" in str(caught.value)) is named


def test_lost_contact_is_one_line_and_a_code_that_says_try_again():
    program = (
        "from rec.runtime.logs import run_main\nfrom rec.runtime.errors import LostContact\n"
        "def main():\n    raise LostContact('lost contact with n2')\nrun_main(main)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (EXIT_TRY_AGAIN, "lost contact with n2\n")


def test_how_long_ranks_wait_is_a_number_of_seconds(monkeypatch):
    monkeypatch.setenv("RECALIGN_TIMEOUT_S", "12.5")
    assert timeout().total_seconds() == 12.5
    for wrong in ("soon", "0", "-3"):
        monkeypatch.setenv("RECALIGN_TIMEOUT_S", wrong)
        with pytest.raises(UserError, match=f"RECALIGN_TIMEOUT_S={wrong} is no number of seconds"):
            timeout()
