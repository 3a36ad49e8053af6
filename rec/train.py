"""Train the recommender of a recipe, on one process or several.

``recalign train RECIPE``, or
``accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 -m rec.train
--config recipe.yaml key=value``
"""

import argparse
import contextlib
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rec.build import FINISHED, MODEL, build_model
from rec.data.prepared import Prepared
from rec.evaluation import evaluate, require_possible, some_instances
from rec.items import IDItems, hash_of_vectors
from rec.job import RecJob, grid_of, load_job, open_data
from rec.models.base import WEIGHTS, Recommender
from rec.runtime import files
from rec.runtime.config import hash_of
from rec.runtime.errors import Diverged
from rec.runtime.logs import run_main
from rec.runtime.process_group import process_group
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder
from rec.trainer import STOP_METRIC, device, train

log = logging.getLogger(__name__)


def run(job: RecJob, command: str) -> dict[str, Any]:
    """Train, or go on with training; every process of a group calls it.

    Args:
        job: the resolved recipe.
        command: what the user typed; goes into the result.

    Returns:
        The content of ``result.json``.
    """
    ranks, folder = Ranks.current(), RunFolder(job.run)
    # A predecessor that is being killed may hold the lock a little longer.
    with folder.lock("trainer", wait_s=30) if ranks.is_first else contextlib.nullcontext():
        result = None
        if ranks.is_first:
            folder.check(job)
            _require_the_same_inputs(job, open_data(job.data, job.run / "data"), folder)
            result = folder.result()
            if result is None:
                folder.claim(job)
        result = ranks.broadcast(result)
        if result is not None:
            return result
        data = open_data(job.data, job.run / "data")
        on = job.rec.train.on
        require_possible(job.rec.evaluate, data, on, ("valid", "test") if on == "train" else ("test",))
        chosen = _train(job, data, folder)
        if ranks.is_first:
            result = _conclude(job, data, folder, chosen, command)
        return ranks.broadcast(result)


def _require_the_same_inputs(job: RecJob, data: Prepared, folder: RunFolder) -> None:
    """Raise a UserError if what the recipe names was overwritten since the run was begun."""
    hashed: dict[Path, Callable[[Path], str]] = {}
    for rec in grid_of(job.rec).values() or [job.rec]:
        if not isinstance(rec.items, IDItems):
            hashed[rec.items.file] = hash_of_vectors
        if rec.train.start is not None:
            hashed[rec.train.start / MODEL / WEIGHTS] = files.sha256_file
    if all(path.is_file() for path in hashed):  # of what is missing the training itself says so, if it is needed still
        hashes = {str(path): hash_file(path) for path, hash_file in sorted(hashed.items())}
        folder.require_the_same_inputs({"data": data.meta["content_hash"], **hashes})


def _train(job: RecJob, data: Prepared, folder: RunFolder) -> str | None:
    """Train the one model, or all of the grid; the name of the best, whose model is then the run's."""
    grid = grid_of(job.rec)
    if not grid:
        train(build_model(job.rec, data), data, job.rec, folder, job.rec.model.name)
        return None
    found, diverged = {}, {}
    for name, rec in grid.items():
        own = RunFolder(job.run / "grid" / name)
        try:
            train(build_model(rec, data), data, rec, own, f"{rec.model.name} {name}")
        except Diverged as error:
            log.warning("%s is out: %s", name, error)
            diverged[name] = error
            continue
        found[name] = files.read_json(own.path / FINISHED)[f"valid_{STOP_METRIC}"]
    if not found:
        raise next(iter(diverged.values()))
    best = max(found, key=found.__getitem__)
    found |= dict.fromkeys(diverged, 0.0)
    if Ranks.current().is_first:
        shutil.copytree(job.run / "grid" / best / MODEL, job.run / MODEL, dirs_exist_ok=True)
        facts = files.read_json(job.run / "grid" / best / FINISHED)
        files.write_json(job.run / FINISHED, {**facts, "chosen": best, "grid": found})
    Ranks.current().barrier()
    return best


def _conclude(job: RecJob, data: Prepared, folder: RunFolder, chosen: str | None, command: str) -> dict[str, Any]:
    """Evaluate on test and write ``result.json``."""
    rec = grid_of(job.rec)[chosen] if chosen else job.rec
    own = RunFolder(job.run / "grid" / chosen) if chosen else folder
    started = time.monotonic()
    model, epochs = Recommender.from_pretrained(job.run / MODEL), own.steps("epoch")
    model.to(device())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    protocol = rec.evaluate.protocol.of_run(data, rec.train.on)
    row = {"model": rec.model.name, "trained_on": rec.train.on, "parameters": parameters}
    row["protocol_hash"] = protocol.hash
    parts = {"test": None}
    if rec.train.on == "train":  # a validation figure of a model that was trained on these items would say nothing
        parts = {"valid": some_instances(data, "valid", rec.train.valid_users), **parts}
    rows = [
        {**row, "part": part, **evaluate(model, data, part, rec.evaluate, some, rec.train.on).summary()}
        for part, some in parts.items()
    ]
    # Of every attempt, and of all members of a grid.
    trained = [epoch for name in grid_of(job.rec) for epoch in RunFolder(job.run / "grid" / name).steps("epoch")]
    trained_s = sum(epoch["seconds"] + epoch.get("evaluation_seconds", 0.0) for epoch in trained or epochs)
    return folder.write_result(
        command,
        hash_of(job.model_dump(mode="json", exclude={"run"})),
        protocol.described(),
        rows,
        trained_s + time.monotonic() - started,
        data={"name": job.data, "content_hash": data.meta["content_hash"], **data.meta["counts"]},
        training={
            **files.read_json(job.run / FINISHED),
            "epochs": len(epochs),
            "seconds_per_epoch": sum(epoch["seconds"] for epoch in epochs) / max(1, len(epochs)),
        },
    )


def main() -> None:
    """Entry of ``python -m rec.train``, also under ``accelerate launch``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a recipe, or the config.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. rec.train.lr=1e-3")
    arguments = parser.parse_args()
    job = load_job(arguments.config, arguments.overrides)
    with process_group():
        run(job, shlex.join(["python", "-m", "rec.train", *sys.argv[1:]]))


if __name__ == "__main__":
    run_main(main)
