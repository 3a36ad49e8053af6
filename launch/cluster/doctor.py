"""``recalign doctor RUN``: which checkpoints there are, which of them are whole, what would be resumed, and why."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.snapshots import SnapshotStore
from launch.cluster.identities import Identity, identities
from llm.resharding import UNIVERSAL
from rec.build import FINISHED
from rec.runtime import files
from rec.runtime.checkpoint import MANIFEST, Checkpoints, Finding
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, RESULT, RunFolder, is_run_config
from rec.runtime.stopping import STOP


@dataclass(frozen=True)
class Diagnosis:
    """What there is of one folder of checkpoints, newest first, and what a job that starts now would do."""

    folder: Path
    findings: list[Finding]
    verdict: str


def diagnose(run: Path) -> list[Diagnosis]:
    """Examine every folder of checkpoints of a run.

    Raises:
        UserError: if it is no run folder.
    """
    if not is_run_config(run / CONFIG):
        raise UserError(f"{run} is no run folder (no {CONFIG} that a run wrote)")
    inner = (path for path in run.glob("*/**/checkpoints") if "step-" not in str(path.relative_to(run)))
    folders, known = [run / "checkpoints", *sorted(inner)], identities(run)
    return [
        _diagnosis(run, folder, known.get(folder.parent))
        for folder in folders
        if folder.is_dir() or folder.parent == run
    ]


def _diagnosis(run: Path, folder: Path, identity: Identity | None) -> Diagnosis:
    findings = [_read(found) for found in Checkpoints(folder).examine()]
    is_done = (folder.parent / FINISHED).exists() or (run / RESULT).exists()
    newest = next((found.checkpoint for found in findings if found.checkpoint), None)
    if is_done:
        return Diagnosis(folder, findings, "nothing: this is finished")
    if newest is None:
        why = "none of them is whole" if findings else "there is none"
        return Diagnosis(folder, findings, f"nothing, it begins at the beginning: {why}")
    damaged = [found for found in findings if found.step > newest.step]
    why = "the newest" if not damaged else f"the newest that is whole, {len(damaged)} after it are damaged"
    differs = identity.differences(newest.meta) if identity else []
    if differs:
        return Diagnosis(folder, findings, f"nothing: step-{newest.step} was written with {' and '.join(differs)}")
    return Diagnosis(
        folder, findings, f"step-{newest.step}: {why}; of {newest.world_size} ranks, any other number may go on"
    )


def _read(found: Finding) -> Finding:
    """The same after its contents were read, as a job does before it resumes."""
    problem = found.checkpoint.damage() if found.checkpoint else None
    return replace(found, checkpoint=None, problem=problem) if problem else found


def further_remarks(run: Path) -> Iterator[str]:
    """What else would matter to a job that starts now."""
    for holder in RunFolder(run).holders():
        yield f"in use: {holder}; a second job would be refused"
    if (run / STOP).exists():
        yield f"{run / STOP} is there: a job that is started by hand would stop at once; delete it"
    left = sorted(run.rglob(f"{files.TEMPORARY_PREFIX}*"))
    for kind, what in ((Path.is_dir, "removed by the next save"), (Path.is_file, "may be deleted while nothing runs")):
        if found := [str(path) for path in left if kind(path)]:
            yield f"left behind by a kill, {what}: {', '.join(found)}"
    store = SnapshotStore(run / "snapshots")
    versions, newest = store.versions(), store.newest()
    if versions and newest is None:
        yield "no snapshot is whole: the generator waits for the trainer to publish one"
    elif newest is not None and not newest.whole:
        yield f"the LLM of snapshot v{newest.version} was in the memory of its trainer: the next one publishes it again"
    elif newest is not None:
        broken = [version for version in versions if version > newest.version]
        yield f"the generator would load snapshot v{newest.version} of step {newest.step}" + (
            f"; {len(broken)} after it are damaged" if broken else ""
        )


def print_diagnoses(run: Path) -> None:
    """For people."""
    for diagnosis in diagnose(run):
        sys.stdout.write(f"{diagnosis.folder}\n")
        for found in diagnosis.findings:
            sys.stdout.write(f"  step-{found.step}: {_described(found)}\n")
        sys.stdout.write(f"  would be resumed: {diagnosis.verdict}\n")
    for remark in further_remarks(run):
        sys.stdout.write(f"{remark}\n")


def _described(found: Finding) -> str:
    if found.checkpoint is None:
        return f"damaged: {found.problem}"
    described = files.read_json(found.folder / MANIFEST)["files"]
    size = sum(facts["bytes"] for facts in described.values())
    age_min = (time.time() - found.folder.stat().st_mtime) / 60
    ranks = found.checkpoint.world_size
    foreign = _foreign(found.folder, described)
    return (
        f"whole, {ranks} ranks, {len(described)} files, {size / 2**20:,.1f} MiB, written {age_min:,.0f} minutes ago"
        + (f"; not its own: {', '.join(foreign)}" if foreign else "")
    )


def _foreign(folder: Path, described: dict[str, Any]) -> list[str]:
    """Files that no save wrote; what was converted for another number of ranks is no stranger."""
    there = set(files.describe_files(folder, hashes=False)) - set(described) - {MANIFEST}
    return sorted(name for name in there if not Path(name).parts[0].endswith(f"-{UNIVERSAL}"))
