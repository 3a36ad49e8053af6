"""``recalign pretrain`` of LMRec, and how any pretraining job is started on this machine: as a cluster user would."""

import os
import sys
import time
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from launch import supervise
from llm.lmrec_job import LMRecJob
from llm.training import STEP
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.progress import progress
from rec.runtime.runfolder import CONFIG, RunFolder
from rec.runtime.stopping import StopFile

MAX_RESTARTS = 3


def pretrain(job: LMRecJob) -> dict[str, Any]:
    """Run LMRec's job to its end, restarting it if it dies having got further; the content of ``result.json``.

    Raises:
        UserError: with the job's own message, if it called its end a user's mistake.
        RuntimeError: if it keeps dying without getting any further.
        Stopped: if the run folder holds a stop file.
    """
    folder, train = RunFolder(job.run), job.llm.train
    with folder.lock("launcher"):
        folder.claim(job)
        done = folder.result()
        if done is not None:
            return done
        child = supervise.Child(
            "pretraining job",
            lambda: command("llm.pretrain", job.run / CONFIG, train.processes, launched=train.zero_stage > 0),
            environment(train.processes),
            job.run / "logs" / "pretrain.log",
            Checkpoints(job.run / "checkpoints").last_step,
        )
        _watch(child, folder, train.steps)
        result = folder.result()
        if result is None:
            raise StopFile(job.run).stopped("in pretraining")
        return result


def command(module: str, config: Path, processes: int, launched: bool = True) -> list[str]:
    """How a cluster user starts such a job: by accelerate launch, or as one plain process."""
    if not launched:
        return [sys.executable, "-m", module, "--config", str(config)]
    accelerate = "gpu.yaml" if torch.cuda.is_available() else "cpu.yaml"
    return [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(resources.files("launch.accelerate").joinpath(accelerate)),
        "--num_processes", str(processes), "--main_process_port", str(supervise.free_port()),
        "-m", module, "--config", str(config),
    ]  # fmt: skip


def environment(processes: int) -> dict[str, str]:
    """What such a job needs in its environment on this machine."""
    own = {"TOKENIZERS_PARALLELISM": "false"}
    if torch.cuda.is_available():
        return own
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, allowed // processes)))
    return own | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}


def _watch(child: supervise.Child, folder: RunFolder, steps: int) -> None:
    try:
        child.start()
        follow = supervise.Follower(folder)
        with progress("Pretrain", steps) as advance:
            while child.process.poll() != 0:
                supervise.restart_if_dead(child, MAX_RESTARTS, folder)
                if row := follow.newest(STEP):
                    losses = (
                        f"{name} {value:.3f}" for name, value in row.items() if name.startswith(("loss", "valid"))
                    )
                    advance(row["step"] + 1, f"{'  '.join(losses)}  {row['tokens_per_s']:,.0f} tokens/s")
                time.sleep(supervise.POLL_S)
    finally:
        child.stop()
