"""``recalign bench rec``: recalign's recommenders beside RecBole, RecTools and RePlay, in one run on one machine.

Stages, each a file in the output folder, so that an interrupted run goes on where it was:

- ``epoch``: seconds of a SASRec training epoch with the exact full softmax, in both precisions, and with sampled
  negatives where a peer has them. The peers train on each user's last window, ours does the same.
- ``models``: seconds of an epoch of every sequence model, and its ratio to SASRec's.
- ``evaluation``: seconds to rank all items for every user.
- ``convergence``: SASRec until early stopping; training seconds until validation NDCG@10 is within 1 % of its best.
- ``floor``: the time of the matrix products alone.
"""

import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.bench import peers
from rec.models import MODELS
from rec.runtime import files
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

log = logging.getLogger(__name__)

STAGES = ("floor", "epoch", "models", "evaluation", "convergence")
PRECISIONS = ("fp32", "bf16")
# The losses that an adapter has, by ours.
LOSSES = {
    "recbole": {"cross-entropy": "ce"},
    "rectools": {"cross-entropy": "fast-ce"},
    "replay": {"cross-entropy": "ce", "sampled-softmax": "sampled"},
}
SAMPLED = ("loss.name=sampled-softmax", "loss.negatives=256")
# Epochs that peers may take to converge, and the loss that gets them there soonest.
CONVERGENCE_EPOCHS = 40
PEER_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Settings:
    """What is compared.

    Attributes:
        data: prepared folders.
        lengths: longest histories that are read.
        names: of the peers.
        seconds: to time each of them.
        stages: which comparisons.
        root: where the peers' environments are.
    """

    data: Sequence[Path]
    lengths: Sequence[int] = (50, 200)
    names: Sequence[str] = tuple(peers.PEERS)
    seconds: float = 30.0
    stages: Sequence[str] = STAGES
    root: Path | None = None


def run(settings: Settings, out: Path, command: str) -> dict[str, Any]:
    """Measure everything that is not measured yet, and write ``result.json``.

    Raises:
        UserError: before anything is measured, if a peer's environment or a data folder is not there.
    """
    for name in settings.names:
        if not peers.is_ready(name, settings.root):
            setup = f"python -m launch.bench.peers --setup {' '.join(settings.names)}"
            raise UserError(f"no environment for {name}; make it with: {setup}")
    for folder in settings.data:
        if not (folder / "interactions.parquet").is_file():
            raise UserError(f"{folder} is no prepared folder; make one with 'recalign prepare'")
    began, folder = time.monotonic(), RunFolder(out)
    measured = []
    for task in _tasks(settings):
        measured.append({"stage": task.stage, **_once(task, out / "measured", settings)})
    rows = _with_ratios(measured)
    return folder.write_result(
        command,
        "",
        {},
        rows,
        time.monotonic() - began,
        claims=_claims(rows),
        machine={"cores": os.cpu_count(), "load_average": os.getloadavg()},
    )


@dataclass(frozen=True)
class Task:
    """One measurement: a name for its file, and who does it."""

    stage: str
    name: str
    peer: str
    arguments: Sequence[str]


def _tasks(settings: Settings) -> list[Task]:
    makers: dict[str, Callable[[Settings, Path], list[Task]]] = {
        "floor": _floor,
        "epoch": _epochs,
        "models": _models,
        "evaluation": _evaluation,
        "convergence": _convergence,
    }
    return [task for stage in settings.stages for folder in settings.data for task in makers[stage](settings, folder)]


def _floor(settings: Settings, folder: Path) -> list[Task]:
    return [
        Task("floor", f"recalign-{length}-{precision}", "recalign", ["floor", *_common(folder, length, precision)])
        for length, precision in itertools.product(settings.lengths, PRECISIONS)
    ]


def _epochs(settings: Settings, folder: Path) -> list[Task]:
    tasks = []
    for length, precision in itertools.product(settings.lengths, PRECISIONS):
        common = [*_common(folder, length, precision), "--seconds", str(settings.seconds)]
        for loss, more in (("cross-entropy", ()), ("sampled-softmax", SAMPLED)):
            ours = ["epoch", *common, "train.windows=last", *more]
            tasks.append(Task("epoch", f"recalign-{length}-{precision}-{loss}", "recalign", ours))
            tasks += [
                Task("epoch", f"{name}-{length}-{precision}-{loss}", name, [*common, "--loss", LOSSES[name][loss]])
                for name in settings.names
                if loss in LOSSES[name]
            ]
        # RecBole trains on every prefix, which is every target: ours on all windows is the same work.
        everything = ["epoch", *common]
        tasks.append(Task("epoch", f"recalign-{length}-{precision}-all-windows", "recalign", everything))
    return tasks


def _models(settings: Settings, folder: Path) -> list[Task]:
    tasks = []
    for length, (name, model) in itertools.product(settings.lengths, MODELS.items()):
        if model.samples == "pairs" or name == "BST":
            continue
        overrides = [f"model={{name: {name}, dim: 64, max_length: {length}}}"]
        if model.samples == "prefix":
            overrides.append("train.batch_size=1024")
        common = [*_common(folder, length, "fp32"), "--seconds", str(settings.seconds), *overrides]
        tasks.append(Task("models", f"{name}-{length}", "recalign", ["epoch", *common]))
    return tasks


def _evaluation(settings: Settings, folder: Path) -> list[Task]:
    length = settings.lengths[0]
    ours = ["evaluation", *_common(folder, length, "fp32")]
    return [
        Task("evaluation", "recalign", "recalign", ours),
        *(
            Task("evaluation", name, name, [*_common(folder, length, "fp32"), "--time-evaluation"])
            for name in settings.names
        ),
    ]


def _convergence(settings: Settings, folder: Path) -> list[Task]:
    """Every system with the loss and precision that converge soonest; validation is not counted for any of them."""
    common = _common(folder, settings.lengths[0], "fp32")
    patient = ["train.epochs=100", "train.patience=8", "train.windows=last"]
    tasks = [Task("convergence", "recalign", "recalign", ["convergence", *common, *patient])]
    if "replay" in settings.names:
        train = ["--epochs", str(CONVERGENCE_EPOCHS), "--evaluate", "--loss", LOSSES["replay"]["sampled-softmax"]]
        tasks.append(Task("convergence", "replay-sampled", "replay", [*common, *train]))
    return tasks


def _common(folder: Path, length: int, precision: str) -> list[str]:
    return ["--data", str(folder.resolve()), "--max-length", str(length), "--precision", precision]


def _once(task: Task, folder: Path, settings: Settings) -> dict[str, Any]:
    """The measurement's result, from its file if it was done before."""
    data = Path(task.arguments[task.arguments.index("--data") + 1]).name
    path = folder / f"{task.stage}-{data}-{task.name}.json"
    if path.is_file():
        return files.read_json(path)
    log.info("%s: %s on %s", task.stage, task.name, data)
    began = time.monotonic()
    if task.peer == "recalign":
        found = _ours(task.arguments)
    else:
        found = peers.run(task.peer, "sasrec", task.arguments, settings.root, timeout_s=PEER_TIMEOUT_S)
    found = {"name": task.name, **found, "wall_s": round(time.monotonic() - began, 1)}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, found)
    return found


def _ours(arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "launch.bench.ours", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise RuntimeError(f"{' '.join(command)} failed: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _with_ratios(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every measurement, with ``ratio``: its time over recalign's in the same comparison."""
    rows = []
    for row in measured:
        own = [other for other in measured if other["peer"] == "recalign" and _comparable(row, other)]
        time_of = _seconds(row)
        base = min((_seconds(other) for other in own if _seconds(other)), default=None)
        ratio = round(time_of / base, 2) if base and time_of else None
        rows.append({**row, "seconds": time_of, "ratio": ratio})
    return rows


def _comparable(row: dict[str, Any], ours: dict[str, Any]) -> bool:
    if (row["stage"], row["data"]) != (ours["stage"], ours["data"]):
        return False
    if row["stage"] in ("evaluation", "convergence"):
        return True
    if row["max_length"] != ours["max_length"]:
        return False
    if row["stage"] == "models":
        return ours["model"] == "SASRec"
    if row["stage"] == "floor":
        return row is ours
    sampled = "sampled" in row["loss"]
    same_loss = sampled == ("sampled" in ours["loss"]) and row["precision"] == ours["precision"]
    # Every target once: RecBole and our "all windows"; the others train on the last window of each user.
    everything = row["name"].startswith("recbole") or row["name"].endswith("all-windows")
    return same_loss and everything == ours["name"].endswith("all-windows")


def _seconds(row: dict[str, Any]) -> float | None:
    """What a stage compares."""
    if row["stage"] == "convergence":
        return seconds_to_converge(row["epochs"])
    return row.get(
        {"epoch": "seconds_per_epoch", "models": "seconds_per_epoch"}.get(row["stage"], f"{row['stage']}_seconds")
    )


def seconds_to_converge(epochs: Sequence[dict[str, Any]], within: float = 0.01) -> float:
    """Training seconds until the first epoch whose validation NDCG@10 is within 1 % of the best of all."""
    best, spent = max(epoch["valid"]["NDCG@10"] for epoch in epochs), 0.0
    for epoch in epochs:
        spent += epoch["train_seconds"]
        if epoch["valid"]["NDCG@10"] >= (1 - within) * best:
            return spent
    raise AssertionError("the best epoch is within 1 % of itself")


def _claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the project's targets are met."""
    wanted = {"recbole": 25.0, "rectools": 10.0, "replay": 10.0}
    claims = []
    for row in rows:
        place = f"{row['data']}, length {row['max_length']}"
        if row["stage"] == "epoch" and row["peer"] in wanted and "sampled" not in row["loss"]:
            least, name = wanted[row["peer"]], f"epoch: {row['peer']} {row['precision']}, {place}"
        elif row["stage"] == "evaluation" and row["peer"] == "recbole":
            least, name = 10.0, f"evaluation: recbole, {place}"
        elif row["stage"] == "convergence" and row["peer"] != "recalign":
            least, name = 2.0, f"convergence: {row['name']}, {place}"
        elif row["stage"] == "models" and MODELS[row["model"]].samples == "prefix":
            claims.append(
                {
                    "id": f"epoch of {row['model']} over SASRec's, {place}",
                    "holds": row["ratio"] <= 5,
                    "figure": row["ratio"],
                }
            )
            continue
        else:
            continue
        claims.append({"id": f"{name}: at least {least:g}x", "holds": row["ratio"] >= least, "figure": row["ratio"]})
    return claims
