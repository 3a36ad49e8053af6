"""Start the trainer and the generator on this machine, watch both, restart whichever dies.

Each job resumes from its own durable state, so a restart needs nothing from here. A job that dies again and again
without having got any further is given up on. Both jobs die with this process, however it dies.
"""

import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from align.config import MainJob, Stages
from align.order import Turns
from align.samples import WAITED_FOR_GENERATOR, SampleLog
from align.start import generator_role
from align.transfer import require_devices
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.errors import UserError
from rec.runtime.parent import PARENT, die_with_parent
from rec.runtime.progress import progress
from rec.runtime.runfolder import CONFIG, RunFolder
from rec.runtime.stopping import StopFile

log = logging.getLogger(__name__)

POLL_S, STOP_GRACE_S, LOG_TAIL_LINES = 0.2, 10.0, 200
MISTAKE = "error: "
EXCEPTION = re.compile(r"(\[rank\d+\]: )?[\w.]*(?<!ChildFailed)(Error|Exception|Interrupt)\b.*|lost contact with .*")


@dataclass
class Child:
    """One job: how to start it, and how far it got when it last died.

    ``command`` gives what starts it, anew each time; ``is_done`` says whether it may end without being started again.
    """

    name: str
    command: Callable[[], list[str]]
    environment: dict[str, str]
    log_path: Path
    place: Callable[[], int]
    cores: set[int] | None = None
    is_done: Callable[[], bool] = lambda: True
    process: subprocess.Popen | None = None
    last_place: int = -1
    futile_restarts: int = 0
    log_begin: int = 0

    def start(self) -> None:
        """Start it, its output appended to its log file."""
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self.last_place = self.place()
        with self.log_path.open("ab") as stream:
            self.log_begin = stream.tell()
            self.process = subprocess.Popen(
                self.command(),
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.environment, PARENT: str(os.getpid())},
                preexec_fn=self._begin,
            )

    def _begin(self) -> None:
        """Between fork and exec."""
        die_with_parent()
        if self.cores is not None:
            os.sched_setaffinity(0, self.cores)

    def stop(self) -> None:
        """End it: politely, then not."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def last_words(log_path: Path, begin: int = 0) -> str:
    """The line of a job's log, from byte ``begin`` on, that says why it ended; raises what ``why`` raises."""
    return why(log_path.read_bytes()[begin:].decode(errors="replace"))


def why(said: str) -> str:
    """The line of all that a job said that tells why it ended: an exception, or simply its last one.

    accelerate's launcher prints a page about the fact that a rank failed after the rank has said why.

    Raises:
        UserError: with the job's own message, if it called its end a user's mistake.
    """
    lines = [line.strip() for line in said.splitlines()]
    recent = lines[-LOG_TAIL_LINES:]
    for line in reversed(recent):
        if line.startswith(MISTAKE):
            raise UserError(line.removeprefix(MISTAKE))
    found = [line for line in recent if EXCEPTION.match(line)]
    return found[-1] if found else next((line for line in reversed(lines) if line), "(it wrote nothing)")


def generate(job: MainJob) -> None:
    """Run the generator alone, until every batch is written.

    Raises:
        TimeoutError: if no batch comes for ``align.wait_timeout_s``: here no trainer waits for it.
        UserError, RuntimeError: as ``align`` does.
    """
    generator = _generator(job, 0)
    _watch(job, RunFolder(job.run), [generator], _Stalled(generator, job.align.wait_timeout_s))


def align(job: MainJob) -> None:
    """Run alignment training to its end.

    Raises:
        UserError: with a job's own message, if that called it a user's mistake.
        RuntimeError: if a job keeps dying; with the end of its log.
    """
    generators = [_generator(job, number) for number in range(job.align.generator.processes)]
    _watch(job, RunFolder(job.run), [_trainer(job), *generators])


def replay(job: MainJob, into: Path) -> None:
    """Run the trainer alone on the sample log of a finished run, writing to ``into``; raises what ``align`` does."""
    _watch(job, RunFolder(into), [_trainer(job, into)])


class _Stalled:
    """Called again and again, raises a TimeoutError once a job has got no further for ``timeout_s``."""

    def __init__(self, child: Child, timeout_s: float) -> None:
        self.child, self.timeout_s = child, timeout_s
        self.place, self.since = child.place(), time.monotonic()

    def __call__(self) -> None:
        place = self.child.place()
        if place != self.place:
            self.place, self.since = place, time.monotonic()
        elif time.monotonic() - self.since > self.timeout_s:
            name, path = self.child.name, self.child.log_path
            raise TimeoutError(f"waited {self.timeout_s:.0f} s for the {name} to get any further; see {path}")


def _watch(job: MainJob, run: RunFolder, children: list[Child], look: Callable[[], None] = lambda: None) -> None:
    """Start the jobs and watch them until the first of them is done; ``look`` is called meanwhile."""
    first = children[0]
    try:
        for child in children:
            child.start()
        with progress("Align", job.align.trainer.steps) as advance:
            follow = Follower(run)
            while first.process.poll() != 0:
                watch_once(children, job.align.max_restarts, run)
                look()
                row = follow.newest("train")
                if row:
                    lag, wait = row["lag_steps"], row["waited_s"]
                    advance(row["step"] + 1, f"reward {row['reward']:.3f}  lag {lag} steps  waited {wait:.2f} s")
                time.sleep(POLL_S)
    finally:
        for child in children:
            child.stop()


def watch_once(children: list[Child], max_restarts: int, run: RunFolder) -> None:
    """Start again what has died, and the others where it died of waiting for them; raises what ``align`` does."""
    for child in children:
        cause = restart_if_dead(child, max_restarts, run)
        if cause is None or WAITED_FOR_GENERATOR not in cause:
            continue
        for other in children:
            if other is not child and other.process.poll() is None:
                log.warning("the %s hangs: %s; starting it again", other.name, cause)
                run.log("restarted", job=other.name, exit_code=None)
                other.stop()
                other.start()


def restart_if_dead(child: Child, max_restarts: int, run: RunFolder) -> str | None:
    """Start a job again that has died, or has ended too early; what it died of, if it did.

    Raises:
        UserError: with the job's own message, if that called it a user's mistake.
        RuntimeError: if it keeps dying.
    """
    code = child.process.poll()
    if code is None or (code == 0 and child.is_done()):
        return None
    cause = last_words(child.log_path, child.log_begin)
    child.futile_restarts = 0 if child.place() > child.last_place else child.futile_restarts + 1
    if child.futile_restarts > max_restarts:
        raise RuntimeError(
            f"the {child.name} died {child.futile_restarts} times without getting any further (exit code {code}):"
            f" {cause}; see {child.log_path}"
        )
    log.warning("the %s died (exit code %d: %s); starting it again", child.name, code, cause)
    run.log("restarted", job=child.name, exit_code=code)
    child.start()
    return cause


def _trainer(job: MainJob, into: Path | None = None) -> Child:
    run, on_gpu, cores = into or job.run, torch.cuda.is_available(), cpu_split(job)[0]
    config = "gpu.yaml" if on_gpu else "cpu.yaml"
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if on_gpu:
        environment |= _visible(gpu_split(job)[0])
    else:
        threads = max(1, (len(cores) if cores else os.cpu_count() or 1) // job.align.trainer.processes)
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(threads)}

    def command() -> list[str]:
        return [
            sys.executable, "-m", "accelerate.commands.launch",
            "--config_file", str(resources.files("launch.accelerate").joinpath(config)),
            "--num_processes", str(job.align.trainer.processes),
            # Of this start: one that was free before may have been taken since.
            "--main_process_port", str(free_port()),
            "-m", "align.trainer", "--config", str(job.run / CONFIG),
            *(["--replay-into", str(into)] if into else []),
        ]  # fmt: skip

    place = Checkpoints(Stages(run).checkpoints).last_step
    return Child("trainer", command, environment, run / "logs" / "trainer.log", place, cores)


def _generator(job: MainJob, number: int) -> Child:
    stages, name = Stages(job.run), generator_role(number)
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if torch.cuda.is_available():
        environment |= _visible([gpu_split(job)[1][number]])
    config = ["--config", str(job.run / CONFIG), "--number", str(number)]
    command = [sys.executable, "-m", "align.generator", *config]
    samples, generator, stop = SampleLog(stages.samples), job.align.generator, StopFile(job.run)
    own = Turns(number, generator.processes, generator.batches_per_call)

    def is_done() -> bool:
        return stop.seen() or samples.next_step(own.has) >= job.align.trainer.steps

    log_path = job.run / "logs" / f"{name}.log"
    return Child(name, lambda: command, environment, log_path, samples.next_step, cpu_split(job)[1], is_done)


def check_devices(job: MainJob) -> None:
    """Whether trainer and generators have room on this machine, before anything is trained for them.

    Raises:
        UserError: what ``require_devices``, ``gpu_split`` and ``cpu_split`` raise.
    """
    require_devices(job.align.weights)
    if torch.cuda.is_available():
        gpu_split(job)
    cpu_split(job)


def cpu_split(job: MainJob) -> tuple[set[int] | None, set[int] | None]:
    """Cores of the trainer and of the generator, out of those that this process may use; None where they share them.

    Raises:
        UserError: if none would be left for the trainer, or this system cannot divide them.
    """
    wanted = job.align.generator.cpu_cores
    if wanted is None or torch.cuda.is_available():
        return None, None
    if not hasattr(os, "sched_setaffinity"):
        raise UserError("align.generator.cpu_cores needs Linux: this system cannot give a process cores of its own")
    cores = sorted(os.sched_getaffinity(0))
    if wanted >= len(cores):
        fewer = f"give it {len(cores) - 1} at most, or " if len(cores) > 1 else "set it to "
        raise UserError(
            f"align.generator.cpu_cores {wanted} leaves none of {len(cores)} cores for the trainer; {fewer}null to"
            " share them"
        )
    return set(cores[:-wanted]), set(cores[-wanted:])


def gpu_split(job: MainJob) -> tuple[list[str], list[str]]:
    """GPUs of the trainer and one of each generator, out of those that this process may use; a single one is shared.

    Raises:
        UserError: if there are too few.
    """
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = allowed.split(",") if allowed else [str(gpu) for gpu in range(torch.cuda.device_count())]
    ranks, generators = job.align.trainer.processes, job.align.generator.processes
    if len(gpus) == ranks == generators == 1:
        if job.align.weights == "nccl":
            raise UserError("align.weights=nccl goes from one GPU to another, and there is one; take gloo or files")
        return gpus, gpus
    if len(gpus) < ranks + generators:
        raise UserError(
            f"align.trainer.processes {ranks} and align.generator.processes {generators} need {ranks + generators}"
            f" GPUs, there are {len(gpus)}; give align.trainer.processes={max(1, len(gpus) - generators)}"
        )
    return gpus[:ranks], gpus[ranks : ranks + generators]


def _visible(gpus: list[str]) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ",".join(gpus)}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Follower:
    """Reads the lines that were added to the metrics file since the last look."""

    def __init__(self, run: RunFolder) -> None:
        self.run, self.offset = run, 0

    def newest(self, *events: str) -> dict | None:
        """The last of the new lines of these kinds, if there is one."""
        rows, self.offset = self.run.events_from(self.offset)
        found = [row for row in rows if row["event"] in events]
        return found[-1] if found else None
