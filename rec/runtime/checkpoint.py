"""Checkpoints of every job: written aside, complete or invisible, resumed from the newest whole one.

Invariants:
- A folder called ``step-N`` with a ``manifest.json`` whose files all have the listed sizes is a complete
  checkpoint. The manifest is written last, the folder renamed into place after it, so a kill at any moment
  leaves either the previous state or a complete new checkpoint.
  Sizes, not checksums: a checkpoint of a large model takes minutes to hash, and all ranks would wait for it.
- Every rank writes its own ``rank-R.pt``; nothing that differs between ranks goes through one file.
- Every rank flushes what it wrote, and rank 0 waits until it sees all of it: on a shared folder another node's file may
  be there late, or short.
- Before a checkpoint is resumed its archives are read against their checksums, each rank a part of them.
- Rank 0 alone chooses what to resume and tells the others, so that ranks never disagree.
- Old checkpoints are deleted only after the new one is in place, and never the first of every ``keep_every`` steps.

Saving is synchronous. ``recalign plan`` says what share of the time it takes; writing behind training's back would buy
part of that, for a second copy of every state in memory and a checkpoint that may yet fail when training has gone on
(docs/cluster.md has the figures).

accelerate's ``save_state`` and DeepSpeed's ``latest`` file have none of these properties, which is why both are
used only through the ``write`` callback below.
"""

import logging
import pickle
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rec.runtime import files
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError, refuse_unless_told
from rec.runtime.ranks import Ranks

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA_VERSION = 2
SEEN_WITHIN_S = 120.0
OWN_FILE = re.compile(r"rank-\d+\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    folder: Path
    step: int
    meta: dict[str, Any]
    world_size: int

    def state(self, rank: int) -> dict[str, Any]:
        """What rank ``rank`` saved: its own ``state`` and the random generators' ``rng``."""
        return torch.load(self.folder / _own_file(rank), map_location="cpu", weights_only=True)

    def damage(self, ranks: Ranks | None = None) -> str | None:
        """What is wrong inside the files, of which each of ``ranks`` reads a part; the same answer on every rank."""
        ranks = ranks or Ranks()
        names = sorted(files.read_json(self.folder / MANIFEST)["files"])[ranks.rank :: ranks.size]
        problems = ranks.gather(next(filter(None, (_problem_inside(self.folder / name) for name in names)), None))
        return next(filter(None, problems), None)


@dataclass(frozen=True)
class Finding:
    """A folder that is named like a checkpoint: the checkpoint that it holds, or the ``problem`` that makes it none."""

    folder: Path
    step: int
    checkpoint: Checkpoint | None
    problem: str | None


class Checkpoints:
    """The checkpoints of one job, in ``folder``.

    Args:
        folder: where ``step-N`` folders live.
        ranks: the processes that save and load together.
        keep_last: how many complete checkpoints survive pruning.
        keep_every: the first at or after every multiple of it is never pruned; None prunes all alike.
    """

    def __init__(
        self, folder: Path, ranks: Ranks | None = None, keep_last: int = 2, keep_every: int | None = None
    ) -> None:
        self.folder = folder
        self.ranks = ranks or Ranks()
        self.keep_last, self.keep_every = keep_last, keep_every
        self.damaged: set[int] = set()

    def save(
        self,
        step: int,
        state: dict[str, Any],
        meta: dict[str, Any] | None = None,
        write: Callable[[Path], None] | None = None,
    ) -> Path:
        """Write checkpoint ``step``, which must not be there yet (``holds``); every rank calls this.

        Args:
            step: finished steps (or epochs); names the folder.
            state: this rank's own state, tensors and plain values only; the random generators are added.
            meta: small JSON facts that belong to the job (config hash, data hash), the same on every rank.
            write: called on every rank with the temporary folder, for engines that write their own files.
        """
        final, temporary = self._name(step), self.folder / f"{files.TEMPORARY_PREFIX}step-{step}"
        if self.ranks.is_first:
            for left in self.folder.glob(f"{files.TEMPORARY_PREFIX}step-*"):
                shutil.rmtree(left, ignore_errors=True)
            # A folder of this name that is still here is incomplete, or resuming would have started after it.
            shutil.rmtree(final, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.ranks.barrier()
        with files.a_full_disk_is_named(temporary):
            if write is not None:
                write(temporary)
            torch.save({"state": state, "rng": rng_state()}, temporary / _own_file(self.ranks.rank))
            files.fsync_below(temporary)
        self.ranks.barrier()
        written = _merged(self.ranks.gather(files.describe_files(temporary, hashes=False)))
        if self.ranks.is_first:
            _wait_until_seen(temporary, written)
            manifest = {
                "schema_version": SCHEMA_VERSION,
                "step": step,
                "world_size": self.ranks.size,
                "meta": meta or {},
                "files": written,
            }
            files.write_json(temporary / MANIFEST, manifest)
            files.publish_folder(temporary, final)
            self._prune(step)
        self.ranks.barrier()
        return final

    def last_step(self) -> int:
        """The newest step that has a manifest, 0 if none has: how far the job got, at a glance."""
        return next((step for step in self._steps() if (self._name(step) / MANIFEST).is_file()), 0)

    def newest(self, below: int | None = None) -> Checkpoint | None:
        """The newest complete checkpoint, or the newest ``below`` a step; the same on every rank, None without one."""
        return self.ranks.broadcast(self._newest_complete(below) if self.ranks.is_first else None)

    def holds(self, step: int) -> bool:
        """Whether there is a complete checkpoint of ``step`` that ``resume`` did not find damaged; the same answer on
        every rank."""
        whole = self.ranks.is_first and step not in self.damaged and self._examine(step).problem is None
        return self.ranks.broadcast(whole)

    def examine(self) -> Iterator[Finding]:
        """Everything that is named like a checkpoint, newest first, and whether it is one."""
        return map(self._examine, self._steps())

    def resume(
        self, meta: dict[str, Any] | None = None, replicated: bool = False
    ) -> tuple[Checkpoint, dict[str, Any]] | None:
        """The newest complete checkpoint and this rank's state, its random generators restored.

        Args:
            meta: facts that must be those that it was saved with.
            replicated: the state of every rank is the same, as under DDP, so that any number of processes may go on
                with it: all take rank 0's, and their random generators begin anew from (step, rank). The caller sees
                it by ``world_size``.

        Raises:
            UserError: if it was written for other ``meta`` (another recipe or data set) and the user has not said
                --resume-anyway; or by another number of processes, unless it is ``replicated``.
        """
        checkpoint = self.newest()
        while checkpoint is not None and (problem := checkpoint.damage(self.ranks)):
            if self.ranks.is_first:
                log.warning("ignoring checkpoint %s: %s", checkpoint.folder, problem)
            self.damaged.add(checkpoint.step)
            checkpoint = self.newest(checkpoint.step)
        if checkpoint is None:
            return None
        for key, expected in (meta or {}).items():
            if checkpoint.meta.get(key) != expected:
                refuse_unless_told(
                    f"{checkpoint.folder} was written with another {key.replace('_', ' ')}"
                    f" ({checkpoint.meta.get(key)}, now {expected})",
                    "use a new run folder",
                )
        if checkpoint.world_size == self.ranks.size:
            saved = checkpoint.state(self.ranks.rank)
            restore_rng(saved["rng"])
            return checkpoint, saved["state"]
        if not replicated:
            raise UserError(
                f"{checkpoint.folder} was written by {checkpoint.world_size} processes, this job has"
                f" {self.ranks.size}; start it with as many processes as before"
            )
        log.info("%s: %d processes go on for %d", checkpoint.folder, self.ranks.size, checkpoint.world_size)
        seed_rng(int(hash_of([checkpoint.step, self.ranks.rank, self.ranks.size])[:8], 16))
        return checkpoint, checkpoint.state(0)["state"]

    def _name(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _steps(self) -> list[int]:
        """Steps of every folder that is named like a checkpoint, newest first."""
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def _examine(self, step: int) -> Finding:
        folder = self._name(step)
        try:
            manifest = files.read_json(folder / MANIFEST)
            problem = files.what_differs(folder, manifest["files"])
            if manifest["schema_version"] != SCHEMA_VERSION:
                problem = f"schema version {manifest['schema_version']}, this program reads {SCHEMA_VERSION}"
            unlisted = {_own_file(rank) for rank in range(manifest["world_size"])} - set(manifest["files"])
            if unlisted:
                problem = f"{MANIFEST} does not list {', '.join(sorted(unlisted))}"
            checkpoint = Checkpoint(folder, step, manifest["meta"], manifest["world_size"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"no readable {MANIFEST} ({type(error).__name__})"
        return Finding(folder, step, None if problem else checkpoint, problem)

    def _newest_complete(self, below: int | None) -> Checkpoint | None:
        for found in self.examine():
            if below is not None and found.step >= below:
                continue
            if found.checkpoint is not None:
                return found.checkpoint
            log.warning("ignoring checkpoint %s: %s", found.folder, found.problem)
        return None

    def _prune(self, saved: int) -> None:
        """Keep the one just saved and, of the others, the newest whole ones; a damaged one may well be newer than all.

        What is damaged, which nothing can resume from, goes when it is older than all that are kept.
        """
        seen = list(self.examine())
        for_good = self._kept_for_good([saved, *(found.step for found in seen if found.checkpoint)])
        others = [found for found in seen if found.step != saved and found.step not in for_good]
        whole = [found.step for found in others if found.checkpoint]
        kept = {saved, *whole[: self.keep_last - 1]}
        for found in others:
            if found.step not in kept and (found.checkpoint or found.step < min(kept)):
                files.remove_folder(found.folder, MANIFEST)

    def _kept_for_good(self, steps: list[int]) -> set[int]:
        """The first at or after every multiple of ``keep_every``: nobody promises that one is saved at just these."""
        if self.keep_every is None:
            return set()
        first: dict[int, int] = {}
        for step in sorted(steps):
            first.setdefault(step // self.keep_every, step)
        return {step for nth, step in first.items() if nth}


def _own_file(rank: int) -> str:
    return f"rank-{rank}.pt"


def _problem_inside(path: Path) -> str | None:
    """What is wrong with the content of a checkpoint's file; None if nothing is."""
    problem = files.archive_problem(path)
    if problem is None and OWN_FILE.fullmatch(path.name):
        try:
            torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # reads the tables, not the tensors
        except pickle.UnpicklingError:
            return None  # whole, but not what a checkpoint may hold: loading it says so
        except Exception as error:  # whatever damaged tables make of it
            problem = f"{path.name} cannot be loaded ({type(error).__name__})"
    return problem


def _merged(seen: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """All files, as who wrote them sees them: others may see a file short, never longer."""
    merged: dict[str, dict[str, Any]] = {}
    for described in seen:
        for name, facts in described.items():
            merged[name] = max(facts, merged.get(name, facts), key=lambda one: one["bytes"])
    return dict(sorted(merged.items()))


def _wait_until_seen(folder: Path, written: dict[str, dict[str, Any]]) -> None:
    """Wait until this node sees what other nodes have written.

    Raises:
        OSError: if it does not.
    """
    end = time.monotonic() + SEEN_WITHIN_S
    while problem := files.what_differs(folder, written):
        if time.monotonic() > end:
            raise OSError(f"{folder}: {problem} here after {SEEN_WITHIN_S:.0f} s, and another node wrote it")
        time.sleep(0.1)


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's and torch's global generators, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        # Of this rank's GPU alone: the same job may go on where it sees fewer of them.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def seed_rng(seed: int) -> None:
    """Set the global generators to their state after ``seed``, below 2**32."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def restore_rng(saved: dict[str, Any]) -> None:
    """Set the global generators to what ``rng_state`` returned."""
    version, internal, gauss = saved["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"][0])
