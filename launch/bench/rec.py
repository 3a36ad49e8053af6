"""``recalign bench rec``: recalign's recommenders beside RecBole, RecTools and RePlay, in one run on one machine.

Stages, each a file in the output folder, so that an interrupted run goes on where it was:

- ``epoch``: seconds of a SASRec training epoch with the exact full softmax, in both precisions, and with sampled
  negatives where a peer has them. The peers train on each user's last window, ours does the same.
- ``models``: seconds of an epoch of every sequence model, and its ratio to SASRec's.
- ``evaluation``: seconds to rank all items for every user.
- ``convergence``: SASRec until early stopping; training seconds until validation NDCG@10 is within 1 % of its best.
- ``floor``: the time of the matrix products alone.
- ``quality``: every model, and every peer's SASRec, trained to the end by early stopping with three seeds: test figures
  as mean and standard error over seeds. Hours, so only on request.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench import peers
from launch.bench.rec_tasks import Settings, Task, tasks
from rec.models import MODELS
from rec.runtime import files
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

log = logging.getLogger(__name__)

PEER_TIMEOUT_S = 3600


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
    for task in tasks(settings):
        measured.append({"stage": task.stage, **_once(task, out / "measured", settings)})
    rows = [*_with_ratios([row for row in measured if row["stage"] != "quality"]), *_over_seeds(measured)]
    return folder.write_result(
        command,
        "",
        {},
        rows,
        time.monotonic() - began,
        claims=_claims(rows),
        machine={"cores": os.cpu_count(), "load_average": os.getloadavg()},
    )


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
        epochs = row.get("epochs")
        best = {"best": max(epoch["valid"]["NDCG@10"] for epoch in epochs)} if epochs else {}
        rows.append({**row, **best, "seconds": time_of, "ratio": ratio})
    return rows


def _over_seeds(measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every system and folder of ``quality``: means and standard errors of test figures over seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in measured:
        if row["stage"] == "quality":
            groups.setdefault((row["data"], row["name"].partition("-seed")[0]), []).append(row)
    rows = []
    for (data, name), runs in groups.items():
        figures: dict[str, float] = {}
        for metric in ("HR@10", "NDCG@10"):
            values = [run["test"][metric] for run in runs]
            figures[metric] = statistics.mean(values)
            figures[f"{metric}_se"] = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        seconds = statistics.mean(run["train_seconds"] for run in runs)
        shared = {key: runs[0][key] for key in ("peer", "max_length", "precision", "loss")}
        best = statistics.mean(run["best_epoch"] for run in runs)
        more = {"seeds": len(runs), "best_epoch": best, "seconds": seconds, "ratio": None}
        rows.append({"stage": "quality", "name": name, "data": data, **shared, **figures, **more})
    return rows


def _comparable(row: dict[str, Any], ours: dict[str, Any]) -> bool:
    if (row["stage"], row["data"]) != (ours["stage"], ours["data"]):
        return False
    if row["stage"] == "evaluation":
        return True
    sampled = "sampled" in row["loss"]
    same_loss = sampled == ("sampled" in ours["loss"]) and row["precision"] == ours["precision"]
    if row["stage"] == "convergence":
        return same_loss
    if row["max_length"] != ours["max_length"]:
        return False
    if row["stage"] == "models":
        return ours["model"] == "SASRec"
    if row["stage"] == "floor":
        return row is ours
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
