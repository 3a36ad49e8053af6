"""``recalign align --replay RUN``: the trainer again, on the samples that RUN recorded; does it end the same?"""

import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from align.config import MainJob, Stages, load_job
from align.samples import SampleLog
from align.snapshots import Snapshot, SnapshotStore
from launch import supervise
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, RunFolder


def replay(source: Path, out: Path, command: str) -> dict[str, Any]:
    """Train again and compare the last snapshots; the content of ``result.json``, whose one claim is the answer.

    An interrupted replay goes on where it was.

    Args:
        source: the run folder of a main job whose alignment is finished.
        out: where the replay writes.
        command: what the user typed; goes into the result.

    Raises:
        UserError: if ``source`` is no such run.
    """
    if not (source / CONFIG).is_file():
        raise UserError(f"{source} is no run folder (no {CONFIG})")
    job = load_job(source / CONFIG)
    then = _finished(job, Stages(job.run), f"the alignment of {source}")
    begin, folder = time.monotonic(), RunFolder(out)
    with folder.lock("launcher"):
        supervise.replay(job, out)
        now = _finished(job, Stages(out), "the replay")
        different = _different_tensors(then, now)
        figure = "no tensor differs" if not different else f"{len(different)} tensors differ, first {different[0]}"
        claim = {"id": "a replay ends with the same weights", "holds": not different, "figure": figure}
        rows = [{"run": str(source), "steps": now.step, "tensors_that_differ": len(different)}]
        return folder.write_result(command, job.identity, {}, rows, time.monotonic() - begin, [claim])


def _finished(job: MainJob, stages: Stages, what: str) -> Snapshot:
    newest, steps = SnapshotStore(stages.snapshots).newest(), job.align.trainer.steps
    if newest is None or newest.step < steps or SampleLog(Stages(job.run).samples).next_step() < steps:
        raise UserError(f"{what} is not finished: it needs all {steps} steps")
    return newest


def _different_tensors(one: Snapshot, other: Snapshot) -> list[str]:
    """Names of tensors that are not equal bit for bit, or are on one side alone."""
    different = []
    for part in ("llm", "recommender"):
        ours, theirs = ({} for _ in range(2))
        for snapshot, weights in ((one, ours), (other, theirs)):
            for path in sorted((snapshot.folder / part).glob("*.safetensors")):
                weights |= load_file(path)
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name]):
                different.append(f"{part}/{name}")
    return different
