"""recalign's side of ``recalign bench rec``: the same command line and result line as the peers' adapters.

A process of its own, like theirs, so that neither side inherits the other's memory or threads.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from rec.build import build_model
from rec.config import RecConfig
from rec.data.prepared import Prepared
from rec.evaluation import evaluate
from rec.models.base import Recommender
from rec.precision import autocast, dtype_of
from rec.runtime.config import apply_overrides, build
from rec.runtime.logs import run_main
from rec.runtime.runfolder import RunFolder
from rec.trainer import EpochTimer, train

PASSES = 5
# The size that every peer's adapter has too, but for RecTools' flat net: its FFN is four times as wide.
SIZE = {"name": "SASRec", "dim": 64, "blocks": 2, "heads": 2, "dropout": 0.2}


def main() -> None:
    """Do one measurement and print it as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=("epoch", "evaluation", "convergence", "floor"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-length", type=int, default=50)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("overrides", nargs="*", help="keys of the rec section")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    data = Prepared.load(arguments.data)
    content = {"model": {**SIZE, "max_length": arguments.max_length}, "train": {"precision": arguments.precision}}
    config = build(RecConfig, apply_overrides(content, arguments.overrides))
    task = {"epoch": time_epochs, "evaluation": time_evaluation, "convergence": converge, "floor": time_floor}
    result = {
        "peer": "recalign",
        "data": arguments.data.name,
        "model": config.model.name,
        "loss": config.loss.name,
        "max_length": arguments.max_length,
        "precision": config.train.precision,
        "batch_size": config.train.batch_size,
        "threads": arguments.threads,
        **task[arguments.task](config, data, arguments.seconds),
        "load_average": os.getloadavg()[0],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    sys.stdout.write(json.dumps(result) + "\n")


def time_epochs(config: RecConfig, data: Prepared, seconds: float) -> dict[str, Any]:
    """Seconds of an epoch, after a few warm steps: as many whole epochs, or as much of one, as fit."""
    timer = EpochTimer(build_model(config, data), data, config)
    timer.run(limit_s=min(5.0, seconds))
    begin, share = time.perf_counter(), 0.0
    processor = time.process_time()
    while time.perf_counter() - begin < seconds:
        share += timer.run(limit_s=seconds - (time.perf_counter() - begin))
    elapsed = time.perf_counter() - begin
    return {
        "seconds_per_epoch": elapsed / share,
        "share_of_epoch_measured": share,
        "targets_per_epoch": timer.targets,
        "processors_used": (time.process_time() - processor) / elapsed,
    }


def time_evaluation(config: RecConfig, data: Prepared, seconds: float) -> dict[str, Any]:
    """Seconds to the figures at the cutoffs, which is what the peers compute, and to every rank.

    The median of a few passes after one that warms up, as of every peer. The model has been trained a little: among an
    untrained one's scores hardly a target is near the first, and most users would be decided by the popular items.
    """
    model, found = build_model(config, data), {}
    EpochTimer(model, data, config).run(limit_s=seconds)
    model.eval()
    for name, complete in (("evaluation_seconds", False), ("every_rank_seconds", True)):
        passes = []
        for _ in range(1 + PASSES):
            begin = time.perf_counter()
            with autocast(torch.device("cpu"), config.train.precision):
                metrics = evaluate(model, data, "test", config.evaluate, complete=complete)
            passes.append(time.perf_counter() - begin)
        found[name] = statistics.median(passes[1:])
    return {**found, "evaluated": len(metrics.ranks), "protocol_hash": protocol_of(config, data)}


def converge(config: RecConfig, data: Prepared, seconds: float) -> dict[str, Any]:
    """Train to the end by early stopping; the curve of training seconds and validation figures."""
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        model: Recommender = train(build_model(config, data), data, config, run, config.model.name)
        rows, spent, epochs = run.steps("epoch"), 0.0, []
        for row in rows:
            spent += row["seconds"]
            if "NDCG@10" not in row:
                continue
            valid = {name: row[name] for name in ("HR@10", "NDCG@10")}
            epochs.append({"epoch": row["step"] + 1, "train_seconds": row["seconds"], "spent": spent, "valid": valid})
        test = evaluate(model, data, "test", config.evaluate).summary()
    best = max(epochs, key=lambda epoch: epoch["valid"]["NDCG@10"])
    told = {"best_epoch": best["epoch"], "train_seconds": spent, "protocol_hash": protocol_of(config, data)}
    return {"epochs": epochs, **told, "test": test}


def protocol_of(config: RecConfig, data: Prepared) -> str:
    """The hash under which the figures of this measurement stand."""
    return config.evaluate.protocol.of_run(data, config.train.on).hash


def time_floor(config: RecConfig, data: Prepared, seconds: float) -> dict[str, Any]:
    """Seconds that the matrix products of one epoch take alone, at the speed that such products have here.

    Three products of [targets, D] x [D, items] for the loss, and 18 D² multiplications a place and block for the
    encoder (its six D x D maps, forward and twice backward); attention itself is left out.
    """
    timer = EpochTimer(build_model(config, data), data, config)
    dtype = dtype_of(config.train.precision)
    dim, rows = config.model.dim, 192
    states, table = torch.randn(rows, dim).to(dtype), torch.randn(data.n_items, dim).to(dtype)
    wide = torch.empty(rows, data.n_items, dtype=dtype)

    def products() -> None:
        torch.mm(states, table.T, out=wide)
        torch.mm(wide, table)
        torch.mm(wide.T, states)

    products()
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < min(seconds, 5):
        products()
        count += 1
    per_row = (time.perf_counter() - begin) / count / rows
    square, narrow = torch.randn(dim, dim).to(dtype), torch.randn(1024, dim).to(dtype)
    narrow @ square
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < 1:
        narrow @ square
        count += 1
    per_place = (time.perf_counter() - begin) / count / 1024 * 18 * config.model.blocks
    loss, encoder = per_row * timer.targets, per_place * timer.places
    return {"loss_seconds": loss, "encoder_seconds": encoder, "floor_seconds": loss + encoder}


if __name__ == "__main__":
    run_main(main)
