"""A run folder: the resolved recipe, one metrics file, one result, and locks that die with their process."""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import resource
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from rec.runtime import config, files
from rec.runtime.errors import UserError, refuse_unless_told

log = logging.getLogger(__name__)

# A file server may keep the lock of a node that has died until its lease is over.
DEAD_NODE_S = 300.0

CONFIG, METRICS, RESULT, INPUTS = "config.yaml", "metrics.jsonl", "result.json", "inputs.json"
# Tells the resolved recipe of a run from a recipe of a user's that happens to have the same name.
CONFIG_HEADER = "# Written by recalign: the resolved recipe of this run folder.\n"


def is_run_config(path: Path) -> bool:
    """Whether ``path`` is the resolved recipe that a run wrote into its folder."""
    if path.name != CONFIG or not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.readline() == CONFIG_HEADER.encode()


def run_override(recipe: Path) -> list[str]:
    """The override by which the resolved recipe of a run means the folder that it lies in, wherever that is now."""
    return [f"run={json.dumps(str(recipe.parent))}"] if is_run_config(recipe) else []


def root_of(folder: Path) -> Path:
    """The run folder that ``folder`` is, or that it holds one stage of; ``folder`` itself where there is none."""
    above = Path(folder).absolute().parents[:2]
    return next((path for path in (Path(folder), *above) if is_run_config(path / CONFIG)), Path(folder))


class RunFolder:
    """The folder of one run.

    Args:
        path: created if absent.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.path.resolve().mkdir(parents=True, exist_ok=True)  # a link may lead nowhere yet
        except OSError as error:
            raise UserError(f"cannot create the run folder {path}: {error.strerror}") from error

    def claim(self, recipe: config.Section) -> None:
        """Write the resolved recipe, after ``check``; raises what that does."""
        self.check(recipe)
        files.write_text(self.path / CONFIG, CONFIG_HEADER + config.to_yaml(recipe))

    def check(self, recipe: config.Section) -> None:
        """Check that this folder is new, or holds a run of the same recipe.

        It may have moved, and the recipe's placement (on how many processes it runs) and selection (a study's seeds)
        may be others.

        Raises:
            UserError: if the folder holds a run of another recipe, naming the first key that differs, or a
                ``config.yaml`` of the user's own.
        """
        target = self.path / CONFIG
        if target.exists() and not is_run_config(target):
            raise UserError(f"{target} is not a run's; use another run folder")
        if not target.exists() and (self.path / RESULT).exists():
            refuse_unless_told(f"{self.path} holds a {RESULT} of nobody knows what recipe", "use another run folder")
        if target.exists():
            now, ignored = recipe.model_dump(mode="json"), ("run", *recipe.placement, *recipe.selection)
            before, after = (config.without(content, ignored) for content in (config.read_recipe(target), now))
            if before != after:
                refuse_unless_told(
                    f"{self.path} holds a run of another recipe ({_first_difference(before, after)})",
                    "use another run folder, start over with --fresh",
                )

    def require_the_same_inputs(self, hashes: dict[str, Any]) -> None:
        """Check that what the recipe names still holds what it held when this run was begun.

        Args:
            hashes: of the contents of data and models, by a name.

        Raises:
            UserError: if not, and the user has not said --resume-anyway: what lies here already was computed from what
                there was then.
        """
        before = self.inputs()
        if any(before.get(name, value) != value for name, value in hashes.items()):
            refuse_unless_told(
                f"the data or the model that {self.path} reads were made anew since it was begun",
                "start over with --fresh, take another run folder",
            )
        if before | hashes != before:
            files.write_json(self.path / INPUTS, before | hashes)

    def inputs(self) -> dict[str, Any]:
        """The hashes of what the recipe names, as far as they are known."""
        path = self.path / INPUTS
        return files.read_json(path) if path.exists() else {}

    def log(self, event: str, **fields: Any) -> None:
        """Append one line to the metrics file; one write call, so that lines of several processes never mix.

        Under a lock, because on NFS two nodes that append at once may write to the same place.
        """
        content = {"event": event, "time_s": round(time.time(), 3), "pid": os.getpid(), **fields}
        line = (json.dumps(content) + "\n").encode()
        descriptor = os.open(self.path / METRICS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            with contextlib.suppress(OSError):  # no locks there: whoever claims the run says so
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            if os.write(descriptor, line) < len(line):  # a full disk; half a line would spoil the next one too
                os.ftruncate(descriptor, size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path / METRICS))
        finally:
            os.close(descriptor)

    def events(self, event: str | None = None) -> list[dict[str, Any]]:
        """The metrics lines, or those of one kind; a line that a kill cut short is left out."""
        rows, _ = self.events_from(0)
        return [row for row in rows if event is None or row["event"] == event]

    def events_from(self, offset: int) -> tuple[list[dict[str, Any]], int]:
        """The whole lines from byte ``offset`` on, and where they end: what was added since the last look."""
        path, rows = self.path / METRICS, []
        if not path.exists():
            return rows, offset
        with path.open("rb") as stream:
            stream.seek(offset)
            text = stream.read()
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows, offset + len(whole)

    def steps(self, event: str) -> list[dict[str, Any]]:
        """One row a step: a step that ran again after a resume counts once, the last time."""
        return [row for _, row in sorted({row["step"]: row for row in self.events(event)}.items())]

    def worked_s(self, *begins: str) -> float:
        """Seconds from the first line of the metrics file to the last, without those before every line of the events
        ``begins``: between attempts nobody was at work. Of one that was killed, up to its last line."""
        rows = sorted(self.events(), key=itemgetter("time_s"))
        return sum(row["time_s"] - last["time_s"] for last, row in pairwise(rows) if row["event"] not in begins)

    def write_result(
        self,
        command: str,
        config_hash: str,
        protocol: dict[str, Any],
        rows: list[dict[str, Any]],
        wall_s: float,
        claims: list[dict[str, Any]] | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Write ``result.json``, the final figures of a run, and return them; a figure that is none is null."""
        peak_kib = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        result = _as_json(
            {
                "command": command,
                "config_hash": config_hash,
                "protocol": protocol,
                "rows": rows,
                "claims": claims or [],
                "wall_s": round(wall_s, 1),
                "peak_rss_bytes": peak_kib * 1024,
                **more,
            }
        )
        files.write_json(self.path / RESULT, result)
        return result

    def last_logged(self) -> int:
        """When the metrics file was last written, in nanoseconds of whatever clock its file system has; 0 if never."""
        try:
            return (self.path / METRICS).stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def result(self) -> dict[str, Any] | None:
        """The final figures, or None while the run is not finished."""
        path = self.path / RESULT
        return files.read_json(path) if path.exists() else None

    def holders(self) -> list[str]:
        """Who is at work here, a phrase for each lock that is held; nobody where a file system has no locks."""
        found = []
        for path in sorted(self.path.glob(".*.lock")):
            with path.open() as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    role = path.name.removeprefix(".").removesuffix(".lock")
                    found.append(f"its {role} runs as {stream.read().strip() or 'another process'}")
                except OSError:
                    return []
        return found

    @contextlib.contextmanager
    def lock(self, role: str, wait_s: float = 1.0) -> Iterator[None]:
        """Hold the only right to be ``role`` in this run; the kernel releases it when the process dies.

        Args:
            role: what only one process may be at a time.
            wait_s: how long to wait for a predecessor to die, or for somebody to be done looking (``holders``);
                DEAD_NODE_S where it belonged to this same SLURM job, which is then its next attempt.

        Raises:
            UserError: if a living process holds it, naming its process id, host and SLURM job; or if the file system
                has no locks.
        """
        path = self.path / f".{role}.lock"
        with path.open("a+") as stream:
            begin = time.monotonic()
            while not try_lock(stream):
                stream.seek(0)
                owner = stream.read().strip() or "another process"
                patience_s = DEAD_NODE_S if _is_of_this_job(owner) else wait_s
                if time.monotonic() - begin >= patience_s:
                    raise UserError(f"{self.path} is in use: its {role} runs as {owner}")
                time.sleep(0.1)
            stream.truncate(0)
            stream.write(f"{this_process()}\n")
            stream.flush()
            yield


def this_process() -> str:
    """Who this is, for whoever finds the run in use."""
    return f"process {os.getpid()} on {socket.gethostname()}{_in_job()}"


def _in_job() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f" in SLURM job {job}" if job else ""


def _is_of_this_job(owner: str) -> bool:
    return bool(_in_job()) and owner.endswith(_in_job())


def try_lock(stream: IO[str]) -> bool:
    """Take the only lock on an open file, if nobody has it; raises UserError if its file system has none."""
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"{stream.name} cannot be locked ({error.strerror}): nothing would keep two jobs off this run folder; mount"
            " its file system with locks (Lustre: -o flock), or take another one"
        ) from error
    return True


def _first_difference(before: Any, now: Any, path: str = "") -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            if before.get(key) != now.get(key):
                return _first_difference(before.get(key), now.get(key), f"{path}.{key}".lstrip("."))
    return f"{path}: {before!r} there, {now!r} now"


def _as_json(content: Any) -> Any:
    """The same with null for every number that JSON has none for."""
    if isinstance(content, dict):
        return {key: _as_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_as_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
