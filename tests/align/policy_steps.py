"""Run by test_policy under ``accelerate launch``: two policy updates, with a checkpoint between them."""

import json
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


def main(recipe: Path, model: str, out: Path) -> None:
    job = config.load(MainJob, recipe)
    accelerator = make_accelerator(job)
    ranks = Ranks.current()
    policy = Policy(model, job.align, accelerator)
    assert policy.stage == job.align.trainer.zero_stage
    samples = SampleLog(out / "samples").read(0)
    share = len(samples) // ranks.size
    mine = slice(ranks.rank * share, (ranks.rank + 1) * share)
    weights = torch.tensor([[0.5, -0.5], [-1.0, 1.5], [2.0, 0.0], [3.0, -2.0]])

    def update(step: int) -> None:
        loss, _, _ = policy.update(step, samples[mine], weights[mine])
        losses = ranks.gather(loss)
        told.append({"loss": sum(losses) / len(losses), "norm": float(policy.engine.get_global_grad_norm())})

    def keep(name: str) -> None:
        gathered = policy.gathered_weights()
        if ranks.is_first:
            save_file(gathered, out / f"{name}.safetensors")

    told: list[dict[str, float]] = []
    checkpoints = Checkpoints(out / "checkpoints", ranks)
    keep("begin")
    update(0)
    keep("one-step")
    checkpoints.save(1, {}, write=policy.save)
    update(1)
    keep("two-steps")
    update(2)
    checkpoint, _ = checkpoints.resume()
    policy.load(checkpoint.folder, checkpoint.world_size)
    keep("restored")
    update(1)
    keep("resumed")
    logprobs = policy.logprobs_of([5, 6, 7, 8])
    if ranks.is_first:
        (out / "told.json").write_text(json.dumps(told))
        (out / "logprobs.txt").write_text(" ".join(map(str, logprobs)))


if __name__ == "__main__":
    with left_together():
        main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
