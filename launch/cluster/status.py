"""``recalign status RUN`` and ``recalign logs RUN``: what a run is doing, from the files in its folder alone.

No scheduler is asked and no process looked for, so it works on any machine that sees the folder, also when the job is
long gone. Whether a run is alive is told by its locks and by how long ago it last wrote something.
"""

import itertools
import re
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec.runtime import files
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, METRICS, RESULT, RunFolder
from rec.runtime.stopping import STOP

ALIVE_S = 120.0
POLL_S = 0.5
# Events that count a job's progress, with the key of the recipe that says how many there will be.
PROGRESS = {
    "train": "align.trainer.steps", "epoch": "rec.train.epochs", "lm_step": "llm.train.steps", "generated": None,
    "pt_step": None, "ft1_step": None, "ft2_step": None,
}  # fmt: skip
RATE_OVER = 20
# What batch scripts note of a job.
JOB_EVENTS = ("attempt", "requeued", "failed", "stopped", "finished")
SUBMISSION, ENVIRONMENT = "submission", "environment.json"
LOOK_FOR_THE_END_EVERY_S = 5.0


@dataclass(frozen=True)
class Status:
    """A run at a glance: ``state``, in one word and a sentence, and ``lines`` of further facts."""

    state: str
    sentence: str
    lines: list[str]


def status(folder: Path, now: float | None = None) -> Status:
    """Read a run folder.

    Args:
        folder: of the run.
        now: seconds since the epoch, if not the present.

    Raises:
        UserError: if it is no run folder.
    """
    now = time.time() if now is None else now
    if not (folder / CONFIG).is_file() and not (folder / "slurm").is_dir() and not (folder / METRICS).is_file():
        raise UserError(f"{folder} is no run folder (no {CONFIG}, {METRICS} or slurm/)")
    run = RunFolder(folder)
    state, sentence = _state(run, now)
    return Status(state, sentence, [*_submissions(folder, now), *_attempts(run, now), *_progress(run), *_kept(folder)])


def last_sign(folder: Path) -> float:
    """When anything of the run was last written, in seconds since the epoch."""
    places = [*folder.rglob(METRICS), *folder.glob("logs/**/*.log"), *folder.glob("slurm/*.out"), folder]
    return max(path.stat().st_mtime for path in places)


def log_files(folder: Path) -> list[Path]:
    """The logs of the latest attempt, and its batch script's, or that of a newer job; without batch jobs, all."""
    attempts = sorted(folder.glob("logs/job-*"), key=lambda path: path.stat().st_mtime)
    logs = sorted(attempts[-1].glob("*.log")) if attempts else sorted(folder.glob("logs/*.log"))
    batch = sorted(folder.glob("slurm/batch-*.out"), key=lambda path: path.stat().st_mtime)[-1:]
    own = [folder / "slurm" / f"batch-{path.name.split('-')[1]}.out" for path in attempts[-1:]]
    return [*(path for path in own if path.is_file() and path not in batch), *batch, *logs]


def follow(folder: Path, lines: int, forever: bool) -> Iterator[str]:
    """The last ``lines`` of every log, and, if ``forever``, what is added until the run is over, however it ends."""
    places: dict[Path, int] = {}
    first, looked, is_over = True, 0.0, False
    while True:
        if (folder / RESULT).exists() or time.monotonic() - looked > LOOK_FOR_THE_END_EVERY_S:
            looked, is_over = time.monotonic(), _is_over(RunFolder(folder))
        for path in log_files(folder):
            with path.open("rb") as stream:
                stream.seek(places.get(path, 0))
                text = stream.read()
            whole = text[: text.rfind(b"\n") + 1]
            places[path] = places.get(path, 0) + len(whole)
            said = whole.decode(errors="replace").splitlines()
            for line in said[max(0, len(said) - lines) :] if first else said:
                yield f"{path.stem}: {line}"
        first = False
        if not forever or is_over:
            return
        time.sleep(POLL_S)


def submissions(folder: Path) -> list[Path]:
    """The folders of a run's submissions, oldest first."""
    found = (re.fullmatch(rf"{SUBMISSION}-(\d+)", path.name) for path in (folder / "slurm").glob(f"{SUBMISSION}-*"))
    return [folder / "slurm" / name[0] for name in sorted(filter(None, found), key=lambda name: int(name[1]))]


def _newest_submission(folder: Path) -> dict[str, Any] | None:
    """What the newest submission says of itself; None where there is none, or it was cut short."""
    paths = [found / ENVIRONMENT for found in submissions(folder)[-1:]]
    return files.read_json(paths[0]) if paths and paths[0].is_file() else None


def _job_rows(run: RunFolder) -> list[dict[str, Any]]:
    """What batch scripts noted of the job whose attempt is the last; nothing if another one was submitted since."""
    rows = [row for row in run.events() if row["event"] in JOB_EVENTS and "job" in row]
    attempts = [row for row in rows if row["event"] == "attempt"]
    if not attempts:
        return []
    newest = _newest_submission(run.path)
    if newest and newest["submitted_at_s"] > rows[-1]["time_s"]:
        return []
    return [row for row in rows if row["job"] == attempts[-1]["job"]]


def _is_over(run: RunFolder) -> bool:
    rows = _job_rows(run)
    if run.result() is not None:
        return True
    if not rows:
        return _began_in_vain(run, time.time()) is not None
    return rows[-1]["event"] in ("failed", "stopped") and not run.holders()


def _began_in_vain(run: RunFolder, now: float) -> Path | None:
    """The output of the newest submission's job, if that has begun, did not get as far as to note it, and is silent."""
    newest = _newest_submission(run.path)
    if newest is None or _job_rows(run) or run.holders():
        return None
    said = run.path / "slurm" / f"batch-{newest['job']}.out"
    return said if said.is_file() and now - said.stat().st_mtime > ALIVE_S else None


def _state(run: RunFolder, now: float) -> tuple[str, str]:
    jobs, holders, age_s = _job_rows(run), run.holders(), now - last_sign(run.path)
    last, age = jobs[-1]["event"] if jobs else None, _duration(age_s)
    if run.result() is not None:
        return "finished", f"{run.path / RESULT} holds the result"
    if (said := _began_in_vain(run, now)) is not None:
        return "failed", f"the job has begun and did not get as far as this run: {_last_line(said)} ({said})"
    if not jobs and not holders and (newest := _newest_submission(run.path)):
        if newest["job"] is None:
            return "refused", "SLURM took no job: the submission was refused, or cut short"
        return "submitted", f"the job has not started yet; last sign {age} ago"
    if holders:  # somebody has gone on with it, whatever became of the job
        last = None
    if last == "failed":
        return "failed", f"job {jobs[-1]['job']} ended with exit code {jobs[-1].get('code')}: {_cause(run.path)}"
    if last == "requeued":
        return "requeued", f"job {jobs[-1]['job']} waits to go on ({jobs[-1].get('why')}), {age} ago"
    if last == "stopped":
        return "stopped", f"{run.path / STOP} asked for it; without that file, the same command goes on"
    alive = bool(holders) or age_s < ALIVE_S
    if (run.path / STOP).exists():
        return "stopping" if alive else "stopped", f"{run.path / STOP} asks for it; last sign {age} ago"
    if holders:
        return "running", f"{holders[0]}; last sign of it {age} ago"
    if alive:
        return "running", f"last sign of it {age} ago"
    where = f"look at its job first (squeue --jobs={jobs[-1]['job']}), then" if jobs else "if its process is gone,"
    return "silent", f"nobody holds its locks, and no sign of it for {age}: {where} start the same command again"


def _cause(folder: Path) -> str:
    """The line of the latest logs that says why a job failed."""
    from launch.supervise import last_words

    said = []
    for path in log_files(folder):
        try:
            said.append(last_words(path))
        except UserError as error:
            return str(error)
    return next((line for line in said if "Error" in line), said[-1] if said else "it wrote nothing")


def _last_line(path: Path) -> str:
    from launch.supervise import last_words

    try:
        return last_words(path)
    except UserError as error:
        return str(error)


def _submissions(folder: Path, now: float) -> Iterator[str]:
    for path in (found / ENVIRONMENT for found in submissions(folder)[-1:]):
        if not path.is_file():
            yield f"submission without {path}: it was cut short"
            continue
        facts = files.read_json(path)
        changed = ", with uncommitted changes" if facts["uncommitted_changes"] else ""
        yield f"submitted {_duration(now - facts['submitted_at_s'])} ago as job {facts['job']} by {facts['command']!r}"
        yield f"code: commit {facts['commit'] or 'unknown'}{changed}; {path.parent}"


def _attempts(run: RunFolder, now: float) -> Iterator[str]:
    rows = run.events("attempt")
    if rows:
        warned, last = len(run.events("warned")), rows[-1]
        begun = _duration(now - last["time_s"])
        yield f"attempts: {len(rows)}, warned {warned} times; last on {last['nodes']} {begun} ago, job {last['job']}"
    restarted = [*run.events("restarted")]
    if restarted:
        yield f"jobs that died and were started again: {len(restarted)}"


def _progress(run: RunFolder) -> Iterator[str]:
    stages = run.events("stage")
    if stages:
        yield f"stages done: {len({row['title'] for row in stages})}, the last one {stages[-1]['title']!r}"
    recipe = read_recipe(run.path / CONFIG) if (run.path / CONFIG).is_file() else {}
    for path in sorted(run.path.rglob(METRICS), key=lambda path: path.stat().st_mtime)[-1:]:
        stage = RunFolder(path.parent)
        for event, key in PROGRESS.items():
            rows = stage.events(event)
            if rows:
                yield _line(event, rows, _value(recipe, key))


def _line(event: str, rows: list[dict[str, Any]], total: int | None) -> str:
    """How far, how fast, how long still, and the newest figures of one kind of event."""
    last = rows[-1]
    done = last["step"] + last.get("batches", 1)
    line = f"{event}: {done}" + (f" of {total}" if total else "")
    # But for the first of each process: before that nobody was at work.
    firsts = [row for _, row in {row["pid"]: row for row in reversed(rows)}.items()]
    taken = [
        (after["time_s"] - before["time_s"]) / (after["step"] - before["step"])
        for before, after in itertools.pairwise(rows[-RATE_OVER:])
        if after not in firsts and after["step"] > before["step"]
    ]
    if taken:
        each = statistics.median(taken)
        line += f", {each:.2f} s each"
        if total and total > done:
            line += f", {_duration((total - done) * each)} to go"
    figures = ("loss", "NDCG@10", "reward", "kl", "lag_steps", "waited_s", "queued", "version", "tokens")
    return line + "".join(f"; {name} {last[name]:.4g}" for name in figures if isinstance(last.get(name), int | float))


def _kept(folder: Path) -> Iterator[str]:
    for path in [folder / "checkpoints", *sorted(folder.glob("*/checkpoints"))]:
        if path.is_dir():
            found = list(Checkpoints(path).examine())
            whole = [finding.step for finding in found if finding.problem is None]
            broken = len(found) - len(whole)
            damaged = f", {broken} damaged (recalign doctor says how)" if broken else ""
            yield f"{path}: checkpoints of steps {', '.join(map(str, sorted(whole))) or 'none'}{damaged}"
    snapshots = sorted(path.name for path in folder.glob("snapshots/v*"))
    if snapshots:
        batches = len(list(folder.glob("samples/batch-*.parquet")))
        yield f"snapshots: newest {snapshots[-1]}; batches of samples: {batches}"


def _value(recipe: dict[str, Any], dotted: str | None) -> Any:
    value: Any = recipe
    for key in dotted.split(".") if dotted else ():
        value = value.get(key) if isinstance(value, dict) else None
    return value if dotted else None


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def print_status(found: Status, folder: Path) -> None:
    """For people."""
    sys.stdout.write(f"{folder}: {found.state}; {found.sentence}\n")
    for line in found.lines:
        sys.stdout.write(f"  {line}\n")
