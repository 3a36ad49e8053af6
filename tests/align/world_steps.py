"""Run by test_world_size under ``accelerate launch``: save on some number of ranks, go on with the same or another."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from align.config import MainJob
from align.policy import Policy
from align.samples import SampleLog
from align.trainer import make_accelerator
from rec.runtime import config
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.ranks import Ranks, left_together


def main(recipe: Path, model: str, out: Path, phase: str) -> None:
    job = config.load(MainJob, recipe)
    accelerator = make_accelerator(job)
    ranks = Ranks.current()
    policy, samples = Policy(model, job.align, accelerator), SampleLog(out / "samples").read(0)
    share = len(samples) // ranks.size
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
    weights = torch.linspace(-1, 2, 2 * len(samples)).reshape(len(samples), 2)

    def keep(name: str) -> None:
        gathered = policy.gathered_weights()
        if ranks.is_first:
            save_file(gathered, out / f"{phase}-{name}.safetensors")

    checkpoints = Checkpoints(out / "checkpoints", ranks)
    if phase == "save":
        for step in range(2):
            policy.update(step, samples[mine], weights[mine])
        checkpoints.save(2, {}, write=policy.save)
    else:
        checkpoint, _ = checkpoints.resume(replicated=True)
        policy.load(checkpoint.folder, checkpoint.world_size)
    keep("two-steps")
    policy.update(2, samples[mine], weights[mine])
    keep("three-steps")
    if phase != "save":
        # What is saved after going on is an ordinary checkpoint again.
        checkpoints = Checkpoints(out / f"checkpoints-{phase}", ranks)
        checkpoints.save(3, {}, write=policy.save)
        policy.update(3, samples[mine], weights[mine])
        checkpoint, _ = checkpoints.resume()
        policy.load(checkpoint.folder, checkpoint.world_size)
        keep("restored")


if __name__ == "__main__":
    with left_together():
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4])
