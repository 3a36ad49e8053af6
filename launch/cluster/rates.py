"""How long each thing takes: as a run measured it, or reckoned from what a GPU can do."""

import itertools
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

import numpy as np

from align.config import MainJob
from align.figures import saving_seconds
from launch.cluster.memory import Shape
from launch.cluster.simulate import Rates
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

LEAST_STEPS = 10


@dataclass(frozen=True)
class Hardware:
    """What a GPU and the machines around it can do.

    Attributes:
        tflops: dense bf16, 10¹² a second (A100: 312).
        mfu: the share of these that training reaches.
        memory_gb_per_s: of the GPU's memory; a token of a decoder cannot be had faster than its weights are read.
        network_gb_per_s: all-reduce bus bandwidth of the slowest link, 10⁹ bytes (``recalign check``).
        disk_gb_per_s: of the run folder, each node.
    """

    tflops: float = 312.0
    mfu: float = 0.4
    memory_gb_per_s: float = 2000.0
    network_gb_per_s: float = 20.0
    disk_gb_per_s: float = 1.0


def measured(run: RunFolder) -> Rates:
    """The means over a run's steps, its first one left out: there both jobs wait for each other to start.

    Raises:
        UserError: if it has too few steps to tell.
    """
    train, generated, refreshed = run.steps("train")[1:], run.events("generated")[1:], run.events("refresh")
    if len(train) < LEAST_STEPS or len(generated) < 2 or not refreshed:
        raise UserError(f"{run.path} has {len(train)} steps of alignment, too few to measure; it takes {LEAST_STEPS}")
    published = [row["publish_s"] for row in run.steps("published") if row["version_step"]]
    saved = [row["save_s"] for row in run.steps("saved")]
    call_s, batch_s = _line([(row["batches"], row["busy_s"]) for row in generated])
    return Rates(
        update_s=mean(row["busy_s"] for row in train) + _between_steps(train, saving_seconds(run)),
        publish_s=mean(published) if published else 0.0,
        checkpoint_s=mean(saved) if saved else 0.0,
        call_s=call_s,
        batch_s=batch_s,
        refresh_s=mean(row["load_s"] + row["canary_s"] for row in refreshed),
    )


def reckoned(job: MainJob, shape: Shape, hardware: Hardware, ranks: int, nodes: int) -> Rates:
    """From the number of parameters and tokens alone; what is not in it (encoding, scoring) is small beside it."""
    trainer, tokens = job.align.trainer, shape.tokens_per_step
    width = 2 if trainer.bf16 else 4
    # 2 FLOP a parameter and token forwards, 4 backwards; the reference only goes forwards.
    flops = (6 + 2) * shape.parameters * tokens
    compute_s = flops / (hardware.tflops * 1e12 * hardware.mfu * ranks)
    gathers = 3 if trainer.zero_stage == 3 else 2
    exchange_s = gathers * shape.trainable * width * (ranks - 1) / ranks / (hardware.network_gb_per_s * 1e9)
    # Texts are drawn together, so many at a time, and every token of theirs costs one reading of the weights.
    round_s = shape.new_tokens * shape.parameters * 2 / (hardware.memory_gb_per_s * 1e9)
    seats, texts = job.llm.engine.max_num_seqs, shape.texts_per_step
    all_at_once = texts * job.align.generator.batches_per_call <= seats
    publication = shape.parameters * width / (hardware.disk_gb_per_s * 1e9)
    saved_bytes = shape.parameters * width + 12 * shape.trainable
    return Rates(
        update_s=compute_s + exchange_s,
        publish_s=publication,
        checkpoint_s=saved_bytes / (hardware.disk_gb_per_s * 1e9 * nodes),
        call_s=round_s if all_at_once else 0.0,
        batch_s=0.0 if all_at_once else round_s * texts / seats,
        refresh_s=publication,
    )


def on_ranks(rates: Rates, measured_on: int, ranks: int) -> Rates:
    """The same measured rates where a step's batch is divided by another number of ranks, as if that were all."""
    return replace(rates, update_s=rates.update_s * measured_on / ranks)


def _between_steps(train: list[dict[str, Any]], saving: dict[int, float]) -> float:
    """Seconds of a step that are neither waiting nor busy nor ``saving``: ranks that agree, lines that are logged."""
    gaps = [
        row["time_s"] - before["time_s"] - row["waited_s"] - row["busy_s"] - saving.get(before["step"], 0.0)
        for before, row in itertools.pairwise(train)
        if row["step"] == before["step"] + 1 and row["pid"] == before["pid"]
    ]
    return max(0.0, mean(gaps)) if gaps else 0.0


def _line(points: list[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope, neither negative, of seconds over batches."""
    batches, seconds = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    if len(set(batches.tolist())) > 1:
        slope, intercept = np.polyfit(batches, seconds, 1)
        if slope >= 0 and intercept >= 0:
            return float(intercept), float(slope)
    return 0.0, float(seconds.sum() / batches.sum())
