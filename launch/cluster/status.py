"""``recalign status RUN`` and ``recalign logs RUN``: what a run is doing, from the files in its folder alone.

No scheduler is asked and no process looked for, so it works on any machine that sees the folder, also when the job is
long gone. Whether a run is alive is told by how long ago it last wrote something.
"""

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
PROGRESS = {"train": "align.trainer.steps", "epoch": "rec.train.epochs", "lm_step": None, "generated": None}
RATE_OVER = 20


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
    age_s = now - last_sign(folder)
    state, sentence = _state(run, age_s)
    return Status(state, sentence, [*_submissions(folder, now), *_attempts(run, now), *_progress(run), *_kept(folder)])


def last_sign(folder: Path) -> float:
    """When anything of the run was last written, in seconds since the epoch."""
    places = [*folder.rglob(METRICS), *folder.glob("logs/**/*.log"), *folder.glob("slurm/*.out"), folder]
    return max(path.stat().st_mtime for path in places)


def log_files(folder: Path) -> list[Path]:
    """The logs of the latest attempt, and the batch script's; of a run without batch jobs, all that there are."""
    attempts = sorted(folder.glob("logs/job-*"), key=lambda path: path.stat().st_mtime)
    logs = sorted(attempts[-1].glob("*.log")) if attempts else sorted(folder.glob("logs/*.log"))
    batch = sorted(folder.glob("slurm/batch-*.out"), key=lambda path: path.stat().st_mtime)[-1:]
    return [*batch, *logs]


def follow(folder: Path, lines: int, forever: bool) -> Iterator[str]:
    """The last ``lines`` of every log, and, if ``forever``, what is added until the run has its result."""
    places: dict[Path, int] = {}
    first = True
    while True:
        is_done = (folder / RESULT).exists()
        for path in log_files(folder):
            text = path.read_bytes()[places.get(path, 0) :]
            whole = text[: text.rfind(b"\n") + 1]
            places[path] = places.get(path, 0) + len(whole)
            said = whole.decode(errors="replace").splitlines()
            for line in said[-lines:] if first else said:
                yield f"{path.stem}: {line}"
        first = False
        if not forever or is_done:
            return
        time.sleep(POLL_S)


def _state(run: RunFolder, age_s: float) -> tuple[str, str]:
    jobs = [row for row in run.events() if row["event"] in ("attempt", "requeued", "failed", "finished")]
    last, age = jobs[-1]["event"] if jobs else None, _duration(age_s)
    if run.result() is not None:
        return "finished", f"{run.path / RESULT} holds the result"
    if last == "failed":
        return "failed", f"job {jobs[-1]['job']} ended with exit code {jobs[-1].get('code')}: {_cause(run.path)}"
    if last == "requeued":
        return "requeued", f"job {jobs[-1]['job']} waits to go on ({jobs[-1].get('why')}), {age} ago"
    if (run.path / STOP).exists():
        return "stopping" if age_s < ALIVE_S else "stopped", f"{run.path / STOP} asks for it; last sign {age} ago"
    if age_s < ALIVE_S:
        return "running", f"last sign of it {age} ago"
    if not run.events():
        return "submitted", f"nothing has started yet; submitted {age} ago"
    return "silent", f"no sign of it for {age}: it died, or its node did; start the same command again"


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


def _submissions(folder: Path, now: float) -> Iterator[str]:
    for path in sorted(folder.glob("slurm/submission-*/environment.json"))[-1:]:
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
        yield f"stages done: {len({row['step'] for row in stages})}, the last one {stages[-1]['title']!r}"
    recipe = read_recipe(run.path / CONFIG) if (run.path / CONFIG).is_file() else {}
    for path in sorted(run.path.rglob(METRICS), key=lambda path: path.stat().st_mtime)[-1:]:
        stage = RunFolder(path.parent)
        for event, key in PROGRESS.items():
            rows = stage.events(event)
            if rows:
                yield _line(event, rows, _value(recipe, key))


def _line(event: str, rows: list[dict[str, Any]], total: int | None) -> str:
    """How far, how fast, how long still, and the newest figures of one kind of event."""
    last, recent = rows[-1], rows[-RATE_OVER:]
    done = last["step"] + last.get("batches", 1)
    line = f"{event}: {done}" + (f" of {total}" if total else "")
    seconds = recent[-1]["time_s"] - recent[0]["time_s"]
    steps = recent[-1]["step"] - recent[0]["step"]
    if steps > 0 and seconds > 0:
        line += f", {seconds / steps:.2f} s each"
        if total and total > done:
            line += f", {_duration((total - done) * seconds / steps)} to go"
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
