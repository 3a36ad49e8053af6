"""``recalign pretrain`` of a RECFORMER: its stages as jobs on this machine, as a cluster user would start them."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import pretraining, recformer_tables, supervise
from launch.commands import delete_run
from llm.recformer.job import FINISHED, RecformerJob, load_job
from llm.recformer.start import STARTED
from rec.runtime import files
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.progress import progress
from rec.runtime.runfolder import CONFIG, RunFolder
from rec.runtime.stopping import StopFile

EVENTS = {"pretrain": ("pt_step",), "finetune": ("ft1_step", "ft2_step")}


def run_command(recipe: Path, overrides: Sequence[str], fresh: bool, command: str) -> None:
    """What ``recalign pretrain`` does with a recipe that has an ``llm.recformer`` section."""
    job = load_job(recipe, overrides)
    if fresh:
        delete_run(job.run)
    recformer_tables.print_stages(run(job, command), job.run)


def run(job: RecformerJob, command: str) -> dict[str, Any]:
    """Run the stages of the recipe that are not done; the content of ``result.json``.

    Raises:
        UserError: with a job's own message, if that called it a user's mistake; or if the recipe has no stages, or what
            is finished was trained on other data than there is now.
        RuntimeError: if a job keeps dying; with the end of its log.
    """
    stages = [name for name in ("pretrain", "finetune") if getattr(job.settings, name) is not None]
    if not stages:
        raise UserError("llm.recformer has neither a pretrain nor a finetune section: there is nothing to do")
    folder = RunFolder(job.run)
    with folder.lock("launcher"):
        folder.claim(job)
        done = {stage: _is_finished(job, stage) for stage in stages}
        finished = folder.result()
        if finished is not None:
            return finished
        for stage in stages:
            if not done[stage]:
                _watch(job, stage)
                if not _is_finished(job, stage):
                    raise StopFile(job.run).stopped(f"in {stage}")
        wall_s = folder.worked_s("attempt", STARTED)
        identity = hash_of([job.identity("finetune"), job.data])
        return folder.write_result(command, identity, {}, rows_of(job), wall_s, speed=speed_of(folder))


def rows_of(job: RecformerJob) -> list[dict[str, Any]]:
    """What the finished stages found: in-batch accuracy of stage-PT, test figures of the others by protocol."""
    rows: list[dict[str, Any]] = []
    if job.settings.pretrain is not None:
        facts = files.read_json(job.pretrain_folder / FINISHED)
        rows.append({"model": "RECFORMER", "stage": "PT", "part": "valid", **facts})
    if job.settings.finetune is not None:
        for stage in ("FT1", "FT2"):
            facts = files.read_json(job.finetune_folder / stage / FINISHED)
            told = {"model": "RECFORMER", "stage": stage, "part": "test", "best_epoch": facts["best_epoch"]}
            for name, figures in facts["test"].items():
                rows.append({**told, "protocol": name, "protocol_hash": facts["protocols"][name]["hash"], **figures})
    return rows


def speed_of(folder: RunFolder) -> dict[str, dict[str, float]]:
    """Useful tokens (no padding) a second of every stage, but for the first steps, in which kernels are made."""
    found = {}
    for event in ("pt_step", "ft1_step", "ft2_step"):
        rows = folder.steps(event)
        rows = rows[min(5, len(rows) // 2) :]
        if rows:
            tokens, seconds = (sum(row[name] for row in rows) for name in ("tokens", "seconds"))
            found[event.removesuffix("_step")] = {"tokens": tokens, "tokens_per_s": round(tokens / seconds, 1)}
    return found


def _is_finished(job: RecformerJob, stage: str) -> bool:
    return len(job.finished(stage)) == (1 if stage == "pretrain" else 2)


def _watch(job: RecformerJob, stage: str) -> None:
    """Start one stage and watch it to its end."""
    folder, config = RunFolder(job.run), getattr(job.settings, stage)
    processes = job.settings.processes
    launched = processes > 1 or job.settings.zero_stage > 0
    child = supervise.Child(
        f"{stage} job",
        lambda: pretraining.command(f"llm.recformer.{stage}", job.run / CONFIG, processes, launched),
        pretraining.environment(processes),
        job.run / "logs" / f"{stage}.log",
        lambda: _place(job, stage),
    )
    try:
        child.start()
        follow = supervise.Follower(folder)
        steps = getattr(config, "steps", None)
        with progress(stage, steps or config.epochs + getattr(config, "fixed_epochs", 0)) as advance:
            while child.process.poll() != 0:
                supervise.restart_if_dead(child, pretraining.MAX_RESTARTS, folder)
                row = follow.newest(*EVENTS[stage])
                if row:
                    title = row["event"].removesuffix("_step").upper()
                    speed = row["tokens"] / row["seconds"]
                    done = row["step"] + 1 if steps else row["epoch"] + (config.epochs if title == "FT2" else 0)
                    unit = "steps" if steps else "epochs"
                    advance(done, f"{unit}, stage-{title}  loss {row['loss']:.3f}  {speed:,.0f} tokens/s")
                time.sleep(supervise.POLL_S)
    finally:
        child.stop()


def _place(job: RecformerJob, stage: str) -> int:
    """How far a stage got, as a number that only grows."""
    if stage == "pretrain":
        return Checkpoints(job.pretrain_folder / "checkpoints").last_step()
    done = [job.finetune_folder / name for name in ("FT1", "FT2")]
    finished = sum((folder / FINISHED).exists() for folder in done)
    return finished * 10**9 + Checkpoints(done[min(finished, 1)] / "checkpoints").last_step()
