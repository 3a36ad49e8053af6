"""``recalign bench align``: what asynchronous alignment gains, and what it leaves on the table.

Four measurements of one recipe, in one run on one machine, each a folder of its own, so that an interrupted run goes on
where it was: synchronous training (a refresh every step, an empty queue), asynchronous training as in the recipe, and
each of the two jobs alone, the trainer on the recorded samples of the asynchronous run, the generator without one.
Asynchronous training cannot be faster than the slower one of the two alone.

On a machine without GPUs the jobs have cores of their own in all four, as they have GPUs of their own on a cluster.
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from align.config import MainJob, Stages, load_job
from align.figures import saving_seconds
from align.samples import SampleLog
from align.snapshots import SnapshotStore
from launch import supervise
from launch.alignment.main_job import MainJobRun
from launch.alignment.study import share_what_comes_before
from launch.alignment.summary import asynchronous
from launch.bench.child import last_line
from launch.bench.machine import machine
from rec.runtime.config import Section
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, RunFolder

log = logging.getLogger(__name__)

CEILING_SHARE, OFFLINE_SHARE = 0.85, 0.9
DRAWN, OFFLINE = "drawn", "vLLM offline"
OFFLINE_TIMEOUT_S = 3600
OWN_CORES = ("align.generator.cpu_cores=1", "align.trainer.processes=1")
IN_FILES = ("align.weights=files",)
SYNCHRONOUS = ("align.refresh_every=1", "align.max_lag_steps=0")


class Measured(Section):
    """What the measurements of a folder are of: where each process runs is part of it."""

    job: MainJob


def run(recipe: Path, overrides: Sequence[str], steps: int, out: Path, command: str) -> dict[str, Any]:
    """Measure what is not measured yet, and write ``result.json``.

    Raises:
        UserError: if there are too few steps or several generators, or ``out`` has the measurements of another recipe.
    """
    given = load_job(recipe, overrides).align.generator
    calls = given.batches_per_call
    if given.processes > 1:
        raise UserError("align.generator.processes: recalign bench align measures one generator")
    if steps <= 2 * calls:
        raise UserError(f"--steps {steps}: more than {2 * calls} are needed, the first call is not measured")
    begin, folder = time.monotonic(), RunFolder(out)
    if not torch.cuda.is_available():
        overrides = [*OWN_CORES, *overrides]
    supervise.check_devices(_job(recipe, overrides, steps, out / "asynchronous", ()))
    with folder.lock("bench"):
        folder.claim(Measured(job=_job(recipe, overrides, steps, Path("-"), ())))
        sync, pair = (
            _aligned(_job(recipe, overrides, steps, out / name, more))
            for name, more in (("synchronous", SYNCHRONOUS), ("asynchronous", ()))
        )
        rates = {
            "synchronous": _rate(sync, RunFolder(sync.run), "train"),
            "asynchronous": _rate(pair, RunFolder(pair.run), "train"),
            "trainer alone": _rate(pair, _trainer_alone(pair, out / "trainer-alone"), "train"),
            "generator alone": _generator_alone(recipe, overrides, steps, out),
        }
        ceiling = min(rates["trainer alone"], rates["generator alone"])
        rows = [{"mode": mode, "samples_per_s": round(rate, 2)} for mode, rate in rates.items()]
        share, figures = rates["asynchronous"] / ceiling, asynchronous(RunFolder(pair.run))
        tokens = {**_tokens_per_s(out / "generator-alone"), OFFLINE: _offline(out / "generator-alone")}
        claims = [
            ("asynchronous training reaches 85 % of the slower job alone", share, CEILING_SHARE),
            (
                "texts are drawn at 90 % of vLLM's own offline throughput",
                tokens[DRAWN] / tokens[OFFLINE],
                OFFLINE_SHARE,
            ),
        ]
        return folder.write_result(
            command,
            pair.identity,
            {},
            rows,
            time.monotonic() - begin,
            [{"id": name, "holds": value >= least, "figure": round(value, 4)} for name, value, least in claims],
            tokens_per_s={name: round(value, 1) for name, value in tokens.items()},
            speedup=round(rates["asynchronous"] / rates["synchronous"], 2),
            asynchronous=figures,
            machine=machine(),
        )


def _job(recipe: Path, overrides: Sequence[str], steps: int, run: Path, more: Sequence[str]) -> MainJob:
    return load_job(recipe, [*overrides, *more, f"align.trainer.steps={steps}", f"run={json.dumps(str(run))}"])


def _aligned(job: MainJob) -> MainJob:
    """The job, with its alignment done."""
    _before_alignment(job)
    newest = SnapshotStore(Stages(job.run).snapshots).newest()
    if newest is None or newest.step < job.align.trainer.steps:
        log.info("%s", job.run.name)
        supervise.align(job)
    return job


def _before_alignment(job: MainJob) -> None:
    share_what_comes_before(job)
    MainJobRun(job).execute("", stop_before_alignment=True)  # what the jobs do not share: the calibration


def _trainer_alone(job: MainJob, into: Path) -> RunFolder:
    newest = SnapshotStore(Stages(into).snapshots).newest()
    if newest is None or newest.step < job.align.trainer.steps:
        log.info("%s", into.name)
        RunFolder(into).claim(job)
        supervise.replay(job, into)
    return RunFolder(into)


def _generator_alone(recipe: Path, overrides: Sequence[str], steps: int, out: Path) -> float:
    """Its rate under the first snapshot, which no bound on staleness makes it wait for."""
    # Without a trainer there are no weights but those in files.
    one_step = _aligned(_job(recipe, overrides, 1, out / "first-snapshot", IN_FILES))
    unbounded = (*IN_FILES, f"align.refresh_every={steps}", f"align.max_lag_steps={steps}")
    job = _job(recipe, overrides, steps, out / "generator-alone", unbounded)
    _before_alignment(job)
    folder = RunFolder(job.run)
    if SampleLog(Stages(job.run).samples).next_step() < steps:
        log.info("%s", job.run.name)
        first, store = Stages(one_step.run).snapshots / "v000000", Stages(job.run).snapshots
        store.mkdir(exist_ok=True)
        if not (store / first.name).exists():
            (store / first.name).symlink_to(first.absolute())
        supervise.generate(job)
    return _rate(job, folder, "generated")


def _tokens_per_s(run: Path) -> dict[str, float]:
    """Of drawing texts alone, of which vLLM's own figure is, and of all that the generator does: the recommender's
    likelihoods and the sample log too. But for its first call."""
    rows = RunFolder(run).steps("generated")[1:]
    tokens = sum(row["tokens"] for row in rows)
    return {DRAWN: tokens / sum(row["generate_s"] for row in rows), "scored and written too": tokens / _seconds(rows)}


def _offline(run: Path) -> float:
    """vLLM's own tokens a second, on the cores of the generator."""
    _, cores = supervise.cpu_split(load_job(run / CONFIG))
    command = ["-m", "launch.bench.offline", "--config", str(run / CONFIG)]
    return float(last_line(command, cores=cores, timeout_s=OFFLINE_TIMEOUT_S).split()[-1])


def _rate(job: MainJob, folder: RunFolder, event: str) -> float:
    """Samples a second but for the first step, or call, in which everything starts."""
    rows = folder.steps(event)[1:]
    per_step = job.align.trainer.batch_size * (2 if job.align.reward_users else 1)
    saving = saving_seconds(folder) if event == "train" else {}
    seconds = _seconds(rows) + sum(saving.get(row["step"], 0.0) for row in rows)
    return sum(row.get("batches", 1) for row in rows) * per_step / seconds


def _seconds(rows: list[dict[str, Any]]) -> float:
    """Working and waiting; what an interruption took is none of it."""
    return sum(row["busy_s"] + row["waited_s"] for row in rows)
