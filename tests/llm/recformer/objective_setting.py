"""A pretraining loss and a batch of it; as a program, under torchrun, on the ranks of a group."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llm.recformer.batches import SequenceMaker
from llm.recformer.job import RecformerJob
from llm.recformer.model import load_recformer
from llm.recformer.objective import Objective, PretrainBatch
from llm.recformer.pretrain import make_objective
from llm.recformer.sources import BatchMaker, Pairs
from llm.recformer.text import item_tokens
from llm.recformer.tuning import choose_tuned
from rec.data.prepared import Prepared
from rec.runtime.config import build
from rec.runtime.ranks import left_together


def make_setting(bert: Path, data: Path, out: Path, stage: dict[str, Any]) -> tuple[Objective, PretrainBatch]:
    """The loss, and this rank's share of a batch of 8 pairs, two of them with the same next item."""
    torch.manual_seed(3)
    recformer = {
        "backbone": str(bert),
        "text": {"attributes": ["title", "kind"]},
        "size": {"max_items": 6, "max_tokens": 48, "new_embedding_std": 0.2},
        "pretrain": {"batch_size": 8, "freeze_word_embeddings": False, **stage},
    }
    job = build(RecformerJob, {"data": str(data), "run": str(out / "run"), "llm": {"recformer": recformer}})
    prepared = Prepared.load(data)
    model, tokenizer = load_recformer(job.settings)
    choose_tuned(model, job.settings.pretrain)
    tokens = item_tokens(prepared, job.settings.text, tokenizer, out / "tokens")
    maker = SequenceMaker(tokens, job.settings.size, tokenizer.cls_token_id)
    batches = BatchMaker(maker, job.settings.pretrain, tokenizer.mask_token_id, len(tokenizer))
    rng = np.random.default_rng(5)
    histories = [rng.integers(1, prepared.n_items + 1, size=size) for size in (1, 7, 3, 9, 2, 4, 5, 1)]
    pairs = Pairs(histories, np.array([4, 9, 1, 4, 20, 7, 8, 11]))
    objective = make_objective(model, job, tokenizer)
    return objective.eval(), batches(pairs, [1, 2])


def main(bert: Path, data: Path, out: Path) -> None:
    torch.distributed.init_process_group("gloo")
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    stage = {"part_tokens": 64, "recompute": True, "mlm_weight": 0.3, "precision": "fp32"}
    objective, batch = make_setting(bert, data, out, stage)
    wrapped = torch.nn.parallel.DistributedDataParallel(objective, broadcast_buffers=False)
    loss, _ = wrapped(batch)
    loss.backward()
    loss = loss.detach()
    torch.distributed.all_reduce(loss)
    if rank == 0:
        found = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
        torch.save({"loss": loss / size, "gradients": found}, out / "found.pt")


if __name__ == "__main__":
    with left_together():
        main(*map(Path, sys.argv[1:]))
