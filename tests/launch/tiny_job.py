"""A tiny main job that is started, killed and looked at: for the tests, and for the soak."""

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors.torch import load_file

from align.config import Stages
from align.samples import SampleLog
from align.snapshots import SnapshotStore
from rec.runtime.runfolder import CONFIG, METRICS, RunFolder

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 40, 4
RECIPE = {
    "rec": {
        "model": {"dim": 16, "heads": 2, "blocks": 1, "max_length": 8, "dropout": 0.1},
        "train": {"batch_size": 16, "epochs": 3, "lr": 5e-3},
    },
    "llm": {
        "item_text": "{title}, {kind}",
        "lmrec": {"vocabulary": 400, "context": 48, "dim": 64, "layers": 1, "heads": 2},
        "train": {"epochs": 2, "batch_size": 16, "lr": 5e-3},
        "knowledge": {"max_new_tokens": 6, "texts": 2},
    },
    "align": {
        "refresh_every": 5,
        "max_lag_steps": 6,
        "fresh_items": 2,
        "others": "newest",
        "reward_users": 0.25,
        "id_dropout": 0.3,
        "watch": ["kind"],
        "objective": {"baseline": "leave-one-out", "temperature": "calibrated"},
        "trainer": {
            "steps": STEPS, "batch_size": BATCH, "warmup_steps": 2, "lr": 1e-3,
            "checkpoint_every": 3, "keep_checkpoints": 2, "keep_checkpoint_every": 12,
        },
        "generator": {"batches_per_call": 2},
        "finish": {"batch_size": 16, "epochs": 2},
        "wait_timeout_s": 120,
    },
}  # fmt: skip


def start(run: Path, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.cli", "align", str(run / CONFIG), f"run={run}", *more]
    log = (run.parent / f"{run.name}.log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(run: Path, process: subprocess.Popen, timeout_s: float = 900) -> str:
    code = process.wait(timeout_s)
    text = (run.parent / f"{run.name}.log").read_text()
    assert code == 0, text[-3000:]
    return text


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, timeout_s: float = 600) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < end, "it did not get there in time"
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "\nState:\tZ" not in status.read_text()


def assert_dead(jobs: Collection[int]) -> None:
    """That processes whose launcher was killed die with it, or before they do anything where they have just begun."""
    end = time.monotonic() + 60
    while any(map(is_alive, jobs)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_alive, jobs)), "a job outlived its launcher"


def before_alignment(finished: RunFolder, folder: Path) -> RunFolder:
    """A copy of the run as it was when alignment began."""
    run = folder / "run"
    shutil.copytree(finished.path, run)
    for name in ("checkpoints", "snapshots", "samples", "seralm", "control", "knowledge/aligned.parquet"):
        path = run / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    (run / "result.json").unlink()
    (run / METRICS).unlink()
    return RunFolder(run)


def final_weights(run: RunFolder) -> dict[str, torch.Tensor]:
    newest = SnapshotStore(Stages(run.path).snapshots).newest()
    assert newest.step == STEPS
    llm, rec = (load_file(folder / "model.safetensors") for folder in (newest.llm, newest.recommender))
    return {f"llm.{key}": value for key, value in llm.items()} | {f"rec.{key}": value for key, value in rec.items()}


def assert_no_sample_lost_or_repeated(run: RunFolder) -> None:
    log = SampleLog(Stages(run.path).samples)
    assert log.next_step() == STEPS
    ordinals = [sample.ordinal for step in range(STEPS) for sample in log.read(step)]
    assert ordinals == list(range(2 * STEPS * BATCH))  # as many reward as fit
    assert [row["step"] for row in run.steps("train")] == list(range(STEPS))
