"""``recalign align --replay RUN``: the trainer again, on the samples that RUN recorded; does it end the same?"""

import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from align.config import MainJob, Stages, load_job
from align.samples import SampleLog
from align.snapshots import LLM, RECOMMENDER, Snapshot, SnapshotStore
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
        folder.claim(job)
        supervise.replay(job, out)
        now = _finished(job, Stages(out), "the replay")
        different = _different_tensors(then, now)
        figure = "no tensor differs"
        if different:
            largest = max(different, key=different.__getitem__)
            figure = f"{len(different)} tensors differ, most {largest}, by {different[largest]:.3g}"
        claim = {"id": "a replay ends with the same weights", "holds": not different, "figure": figure}
        rows = [{"run": str(source), "steps": now.step, "tensors_that_differ": len(different)}]
        return folder.write_result(command, job.identity, {}, rows, time.monotonic() - begin, [claim])


def _finished(job: MainJob, stages: Stages, what: str) -> Snapshot:
    newest, steps = SnapshotStore(stages.snapshots).newest(), job.align.trainer.steps
    if newest is None or newest.step < steps or SampleLog(Stages(job.run).samples).next_step() < steps:
        raise UserError(f"{what} is not finished: it needs all {steps} steps")
    return newest


def _different_tensors(one: Snapshot, other: Snapshot) -> dict[str, float]:
    """Tensors that are not equal bit for bit, and by how much at most: ``inf`` for one that is on one side alone."""
    ours, theirs = _weights(one), _weights(other)
    different = dict.fromkeys(ours.keys() ^ theirs.keys(), math.inf)
    for name in ours.keys() & theirs.keys():
        if not torch.equal(ours[name], theirs[name]):
            same_shape = ours[name].shape == theirs[name].shape
            different[name] = (ours[name] - theirs[name]).abs().max().item() if same_shape else math.inf
    return different


def _weights(snapshot: Snapshot) -> dict[str, torch.Tensor]:
    """All tensors of both models, as "llm/name" and "recommender/name"."""
    return {
        f"{part}/{name}": value
        for part in (LLM, RECOMMENDER)
        for path in sorted((snapshot.folder / part).glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
