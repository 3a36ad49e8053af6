"""The snapshot store: what the trainer hands to the generator, LLM and recommender together.

Invariants:
- A folder ``vNNNNNN`` with a manifest whose files all match their checksums is a snapshot; the manifest is written
  last and the folder renamed into place after it. Anything else is never offered to a reader.
- A version is never overwritten. A trainer that resumes and comes past the same step again finds it there.
- Both models are of the same step: a reader swaps both or neither.
- A snapshot without an LLM stands for weights that the trainer which published it has in its memory (`align.weights`).
  When that trainer dies nobody can load it any more: it may be published again, of another step too.
"""

import contextlib
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rec.runtime import files
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)

MANIFEST, LLM, RECOMMENDER = "manifest.json", "llm", "recommender"
SCHEMA_VERSION = 1
CANARY_TOKENS = 24


@dataclass(frozen=True)
class Snapshot:
    """One published pair of models.

    Attributes:
        folder: holds ``recommender``, and ``llm`` (Hugging Face format, with tokenizer) if it is ``whole``.
        version: 0, 1, 2 …
        step: trainer steps finished when it was made.
        canary_tokens: a fixed text.
        canary_logprobs: log p of its tokens, from the second on, computed by the trainer with these very weights.
    """

    folder: Path
    version: int
    step: int
    canary_tokens: list[int]
    canary_logprobs: list[float]

    @property
    def llm(self) -> Path:
        """Folder of the LLM."""
        return self.folder / LLM

    @property
    def recommender(self) -> Path:
        """Folder of the recommender."""
        return self.folder / RECOMMENDER

    @property
    def whole(self) -> bool:
        """Whether the LLM is there as files."""
        return self.llm.is_dir()


class SnapshotStore:
    """The snapshots in ``folder``.

    Args:
        folder: created by the first publication.
        keep_last: complete versions that survive pruning.
    """

    def __init__(self, folder: Path, keep_last: int = 4) -> None:
        self.folder, self.keep_last = folder, keep_last
        # What was found of each version while its files look the same: hashing takes long, whoever waits asks often.
        self._found: dict[int, tuple[object, Snapshot | None]] = {}
        self._warned: set[str] = set()

    def publish(
        self,
        version: int,
        step: int,
        write: Callable[[Path], None],
        canary_tokens: list[int],
        canary_logprobs: list[float],
        whole: bool = True,
    ) -> Snapshot:
        """Write a version, unless it is already there, and prune old ones. One process calls this.

        A version without an LLM belongs to weights that only its trainer has: one by other weights, as a trainer that
        was started again on another device may have, takes its place.

        Args:
            version: its number.
            step: finished trainer steps.
            write: writes ``llm`` and ``recommender`` into the folder it is given.
            canary_tokens: a fixed text.
            canary_logprobs: its log-probs under the published weights.
            whole: whether ``write`` writes an LLM.

        Raises:
            UserError: if it is there already, but of another step.
        """
        if self.holds(version, step, whole):
            held = self.get(version)
            if held.whole or held.canary_logprobs == canary_logprobs:
                return held
        final = self._name(version)
        shutil.rmtree(final, ignore_errors=True)  # of no use to anybody, as just found
        temporary = self.folder / f"{files.TEMPORARY_PREFIX}{final.name}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with files.a_full_disk_is_named(temporary):
            write(temporary)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "version": version,
            "step": step,
            "canary": {"token_ids": canary_tokens, "logprobs": canary_logprobs},
            "files": files.describe_files(temporary, hashes=True),
        }
        files.write_json(temporary / MANIFEST, manifest)
        files.publish_folder(temporary, final)
        snapshot = Snapshot(final, version, step, canary_tokens, canary_logprobs)
        self._found[version] = _looks_of(final), snapshot
        self._prune()
        return snapshot

    def holds(self, version: int, step: int, whole: bool = True) -> bool:
        """Whether this version is there, complete, and with an LLM if it is to be ``whole``.

        Raises:
            UserError: if it is there with an LLM, but of another step.
        """
        existing = self.get(version)
        if existing is None or not existing.whole:
            return existing is not None and not whole and existing.step == step
        if existing.step != step:
            raise UserError(
                f"{existing.folder} is of step {existing.step}, not {step}: it was published under another"
                " align.refresh_every or after damage; delete it, or start over with --fresh"
            )
        return True

    def versions(self) -> list[int]:
        """Numbers of everything named like a snapshot, newest first."""
        names = (re.fullmatch(r"v(\d+)", path.name) for path in self.folder.glob("v*"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def newest(self, after: int = -1, whole: bool = False) -> Snapshot | None:
        """The newest complete snapshot whose version is above ``after``, with an LLM if asked for; None without one."""
        for version in self.versions():
            if version <= after:
                return None
            snapshot = self.get(version)
            if snapshot is not None and (snapshot.whole or not whole):
                return snapshot
        return None

    def _prune(self) -> None:
        """Delete what is older than ``keep_last`` complete versions."""
        complete = 0
        for version in self.versions():
            if complete >= self.keep_last:
                files.remove_folder(self._name(version), MANIFEST)
                self._found.pop(version, None)
            elif self.get(version) is not None:
                complete += 1

    def get(self, version: int) -> Snapshot | None:
        """A version, if it is there and complete."""
        folder = self._name(version)
        if not folder.exists():
            return None
        looks = _looks_of(folder)
        if version not in self._found or self._found[version][0] != looks:
            try:
                self._found[version] = looks, self._checked(folder, version)
            except OSError as error:  # perhaps a network file system's bad moment: the next look may find it whole
                self._warn(folder, str(error))
                return None
        return self._found[version][1]

    def _checked(self, folder: Path, version: int) -> Snapshot | None:
        try:
            manifest = files.read_json(folder / MANIFEST)
            problem = files.what_differs(folder, manifest["files"])
            if manifest["schema_version"] != SCHEMA_VERSION:
                problem = f"schema version {manifest['schema_version']}, this program reads {SCHEMA_VERSION}"
            canary, step = manifest["canary"], manifest["step"]
            snapshot = Snapshot(folder, version, step, canary["token_ids"], canary["logprobs"])
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            problem = f"no readable {MANIFEST} ({type(error).__name__})"
        if problem is not None:
            self._warn(folder, problem)
            return None
        return snapshot

    def _warn(self, folder: Path, problem: str) -> None:
        if folder.name not in self._warned:
            log.warning("ignoring incomplete snapshot %s: %s", folder, problem)
            self._warned.add(folder.name)

    def _name(self, version: int) -> Path:
        return self.folder / f"v{version:06d}"


def _looks_of(folder: Path) -> list[tuple[str, int, int, int]]:
    """Name, inode, size and time of every file: what changes when one of them does."""
    found = []
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # it is being deleted
            seen = path.stat()
            found.append((str(path), seen.st_ino, seen.st_size, seen.st_mtime_ns))
    return found
