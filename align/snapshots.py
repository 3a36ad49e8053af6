"""The snapshot store: what the trainer hands to the generator, LLM and recommender together.

Invariants:
- A folder ``vNNNNNN`` with a manifest whose files all match their checksums is a snapshot; the manifest is written
  last and the folder renamed into place after it. Anything else is never offered to a reader.
- A version is never overwritten. A trainer that resumes and comes past the same step again finds it there.
- Both models are of the same step: a reader swaps both or neither.
"""

import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rec.runtime import files

log = logging.getLogger(__name__)

MANIFEST, LLM, RECOMMENDER = "manifest.json", "llm", "recommender"
SCHEMA_VERSION = 1
CANARY_TOKENS = 24


@dataclass(frozen=True)
class Snapshot:
    """One published pair of models.

    Attributes:
        folder: holds ``llm`` (Hugging Face format, with tokenizer) and ``recommender``.
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


class SnapshotStore:
    """The snapshots in ``folder``.

    Args:
        folder: created by the first publication.
        keep_last: complete versions that survive pruning.
    """

    def __init__(self, folder: Path, keep_last: int = 4) -> None:
        self.folder, self.keep_last = folder, keep_last
        self._warned: set[str] = set()

    def publish(
        self,
        version: int,
        step: int,
        write: Callable[[Path], None],
        canary_tokens: list[int],
        canary_logprobs: list[float],
    ) -> Snapshot:
        """Write a version, unless it is already there, and prune old ones. One process calls this.

        Args:
            version: its number.
            step: finished trainer steps.
            write: writes ``llm`` and ``recommender`` into the folder it is given.
            canary_tokens: a fixed text.
            canary_logprobs: its log-probs under the published weights.
        """
        existing = self._load(version)
        if existing is not None:
            return existing
        final = self._name(version)
        shutil.rmtree(final, ignore_errors=True)  # incomplete, as just found
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
        for old in self.versions()[self.keep_last :]:
            files.remove_folder(self._name(old), MANIFEST)
        return Snapshot(final, version, step, canary_tokens, canary_logprobs)

    def versions(self) -> list[int]:
        """Numbers of everything named like a snapshot, newest first."""
        names = (re.fullmatch(r"v(\d+)", path.name) for path in self.folder.glob("v*"))
        return sorted((int(name[1]) for name in names if name), reverse=True)

    def newest(self, after: int = -1) -> Snapshot | None:
        """The newest complete snapshot whose version is above ``after``; None if there is none."""
        for version in self.versions():
            if version <= after:
                return None
            snapshot = self._load(version)
            if snapshot is not None:
                return snapshot
        return None

    def _load(self, version: int) -> Snapshot | None:
        folder = self._name(version)
        if not folder.exists():
            return None
        try:
            manifest = files.read_json(folder / MANIFEST)
            problem = files.what_differs(folder, manifest["files"])
            if manifest["schema_version"] != SCHEMA_VERSION:
                problem = f"schema version {manifest['schema_version']}, this program reads {SCHEMA_VERSION}"
            canary, step = manifest["canary"], manifest["step"]
            snapshot = Snapshot(folder, version, step, canary["token_ids"], canary["logprobs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"no readable {MANIFEST} ({type(error).__name__})"
        if problem is not None:
            if folder.name not in self._warned:
                log.warning("ignoring incomplete snapshot %s: %s", folder, problem)
                self._warned.add(folder.name)
            return None
        return snapshot

    def _name(self, version: int) -> Path:
        return self.folder / f"v{version:06d}"
