"""What the measurements of ``recalign bench rec`` say: ratios between systems, means over seeds, targets that hold."""

import statistics
from collections.abc import Sequence
from typing import Any

from rec.models import MODELS

# A run has converged where it is within 1 % of the best validation NDCG@10.
CONVERGED = 0.99


def rows_of(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a measurement, with its ``ratio``, but one row for all seeds of a system in ``quality``."""
    failed = [row for row in measured if "failed" in row]
    done = [row for row in measured if "failed" not in row]
    quality = [row for row in done if row["stage"] == "quality"]
    return [*_with_ratios([row for row in done if row["stage"] != "quality"]), *_over_seeds(quality), *failed]


def _with_ratios(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """``seconds``: what the stage compares; ``ratio``: that over recalign's in the same comparison.

    For ``convergence`` both count to the same quality: within 1 % of the row's own best.
    """
    rows = []
    for row in measured:
        own = [other for other in measured if other["peer"] == "recalign" and _comparable(row, other)]
        found: dict[str, Any] = {"seconds": _seconds(row)}
        if row["stage"] == "convergence":
            found["best"] = _best(row["epochs"])
            ours = [seconds_to_reach(other["epochs"], CONVERGED * found["best"]) for other in own]
        else:
            ours = [_seconds(other) for other in own]
        base = min((seconds for seconds in ours if seconds is not None), default=None)
        found["ratio"] = None if base is None else round(found["seconds"] / base, 2)
        rows.append({**row, **found})
    return rows


def _over_seeds(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every system and folder of ``quality``: means and standard errors of test figures over seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in measured:
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
    if any(row[key] != ours[key] for key in ("stage", "data", "max_length")):
        return False
    if row["stage"] in ("evaluation", "convergence"):
        return True
    if row["stage"] == "models":
        return ours["model"] == "SASRec"
    if row["stage"] == "floor":
        return row is ours
    # Every target once: RecBole and our "all windows"; the others train on the last window of each user.
    everything = row["name"].startswith("recbole") or row["name"].endswith("all-windows")
    same_loss = ("sampled" in row["loss"]) == ("sampled" in ours["loss"]) and row["precision"] == ours["precision"]
    return same_loss and everything == ours["name"].endswith("all-windows")


def _seconds(row: dict[str, Any]) -> float:
    """What a stage compares."""
    if row["stage"] == "convergence":
        reached = seconds_to_reach(row["epochs"], CONVERGED * _best(row["epochs"]))
        assert reached is not None, "the best epoch reaches its own level"
        return reached
    names = {"epoch": "seconds_per_epoch", "models": "seconds_per_epoch"}
    return row[names.get(row["stage"], f"{row['stage']}_seconds")]


def seconds_to_reach(epochs: Sequence[dict[str, Any]], level: float) -> float | None:
    """Training seconds until the first epoch whose validation NDCG@10 is ``level``; None if there is none."""
    return next((epoch["spent"] for epoch in epochs if epoch["valid"]["NDCG@10"] >= level), None)


def _best(epochs: Sequence[dict[str, Any]]) -> float:
    return max(epoch["valid"]["NDCG@10"] for epoch in epochs)


def claims_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whether the project's targets are met."""
    wanted = {"recbole": 25.0, "rectools": 10.0, "replay": 10.0}
    claims = []
    for row in rows:
        if "failed" in row:
            continue
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
                    "holds": row["ratio"] is not None and row["ratio"] <= 5,
                    "figure": row["ratio"],
                }
            )
            continue
        else:
            continue
        # No ratio: we never got to where the peer did.
        holds = row["ratio"] is not None and row["ratio"] >= least
        claims.append({"id": f"{name}: at least {least:g}x", "holds": holds, "figure": row["ratio"] or 0.0})
    return claims
