"""stage-PT of RECFORMER, on any number of ranks.

``recalign pretrain RECIPE``, or
``accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 -m llm.recformer.pretrain
--config recipe.yaml key=value``

Training is a deterministic function of the recipe and the data: a killed run goes on from its last checkpoint, and
ends with the same bits on CPU.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from llm.recformer.batches import SequenceMaker
from llm.recformer.contrastive import item_contrast
from llm.recformer.engine import Engine, make_accelerator, mean_over_ranks
from llm.recformer.job import FINISHED, RecformerJob
from llm.recformer.mlm import MaskedLMHead
from llm.recformer.model import RecformerModel, load_recformer, resolve
from llm.recformer.objective import Objective, Parts, encode
from llm.recformer.sources import BatchMaker, Sources, batches_of
from llm.recformer.start import run_stage
from llm.recformer.text import ItemTokens, item_tokens
from llm.recformer.tuning import choose_tuned
from rec.runtime import files
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.progress import progress
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import StopFile

log = logging.getLogger(__name__)

MODEL = "model"


class Pretraining:
    """stage-PT in its run folder; one instance a rank.

    Args:
        job: the recipe.
        accelerator: from ``make_accelerator``.

    Raises:
        UserError: if model, data and recipe do not fit.
    """

    def __init__(self, job: RecformerJob, accelerator: Accelerator) -> None:
        self.job, self.stage, self.ranks = job, job.settings.pretrain, Ranks.current()
        self.run, self.folder = RunFolder(job.run), job.pretrain_folder
        torch.manual_seed(self.stage.seed)
        model, self.tokenizer = load_recformer(job.settings)
        if self.tokenizer.mask_token_id is None:
            raise UserError(f"the tokenizer of {job.settings.backbone} has no [MASK]: it cannot be pretrained here")
        choose_tuned(model, self.stage)
        data = [job.open(name) for name in self.stage.sources or [job.data]]
        self.sources = Sources(data, self.stage)
        tokens = ItemTokens.join([item_tokens(own, job.settings.text, self.tokenizer, job.tokens) for own in data])
        maker = SequenceMaker(tokens, job.settings.size, self.tokenizer.cls_token_id)
        vocabulary = model.backbone.get_input_embeddings().num_embeddings
        self.batches = BatchMaker(maker, self.stage, self.tokenizer.mask_token_id, vocabulary)
        self.steps = self.sources.steps()
        self.total = self.stage.steps or self.steps * self.stage.epochs
        objective = make_objective(model, job, self.tokenizer)
        self.engine = Engine(objective, self.stage, job.settings, self.total, accelerator)
        keep = self.stage.keep_checkpoints, self.stage.keep_checkpoint_every
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.ranks, *keep)
        self.stop = StopFile(job.run, self.ranks)
        self.meta = {"config_hash": job.identity("pretrain"), **job.inputs(data)}
        self.best, self.best_step, self.best_weights = -1.0, 0, self.engine.weights()

    def loop(self) -> Path:
        """Train to the last step; returns the folder of the model that is kept: the one with the best validation
        accuracy, the last where there is no contrast or nothing to validate it by."""
        found = self.engine.resume(self.checkpoints, self.meta)
        done = 0
        if found is not None:
            done, state = found
            self.best, self.best_step, self.best_weights = (state[name] for name in ("best", "best_step", "weights"))
            log.info("resuming stage-PT after step %d", done)
        with progress("stage-PT", self.total, self.ranks.is_first) as advance:
            for step in range(done, self.total):
                row = self._step(step)
                if (step + 1) % self.stage.evaluate_every == 0 or step + 1 == self.total:
                    row["valid_accuracy"] = self._validate(step + 1)
                if self.ranks.is_first:
                    self.run.log("pt_step", step=step, epoch=step // self.steps, **row)
                    speed = row["tokens"] / row["seconds"]
                    advance(step + 1, f"loss {row['loss']:.3f}  accuracy {row['accuracy']:.2f}  {speed:,.0f} tokens/s")
                # After the log, which a kill in between would lose a line of.
                stopping = step + 1 < self.total and self.stop.agreed()
                if stopping or (step + 1) % self.stage.checkpoint_every == 0:
                    state = {"best": self.best, "best_step": self.best_step, "weights": self.best_weights}
                    self.engine.save(self.checkpoints, step + 1, state, self.meta)
                if stopping:
                    raise self.stop.stopped(f"after step {step + 1} of stage-PT")
        self._finish()
        return self.folder / MODEL

    def _step(self, step: int) -> dict[str, float]:
        """One step's figures, over all ranks."""
        begin, epoch = time.monotonic(), step // self.steps
        pairs = self.sources.pairs(epoch, step % self.steps)
        batch = self.batches(pairs, [self.stage.seed, 3, step])
        loss, told = self.engine.update(step, batch)
        names = ["contrast", "mlm", "accuracy", "tokens", "places"]
        values = mean_over_ranks([loss, *(told[name] for name in names)], self.engine.device)
        row = dict(zip(["loss", *names], values, strict=True))
        if not math.isfinite(row["loss"]):
            raise UserError(f"the loss is {row['loss']} at step {step}: lower llm.recformer.pretrain.lr")
        # Tokens are counted over all ranks.
        row |= {name: round(row[name] * self.ranks.size) for name in ("tokens", "places")}
        return {**row, "seconds": time.monotonic() - begin}

    def _validate(self, step: int) -> float | None:
        """Share of validation histories that are nearer to their own next item than to any other of their batch."""
        accuracy = accuracy_of(self.engine.module, self.sources, self.batches)
        # The last weights are kept without a validation part, and without a contrast, whose accuracy this is.
        if accuracy is None or not self.stage.contrast_weight or accuracy > self.best:
            self.best, self.best_step = accuracy if accuracy is not None else -1.0, step
            self.best_weights = self.engine.weights()
        return accuracy

    def _finish(self) -> None:
        self.engine.module.load_state_dict(self.best_weights)
        if self.ranks.is_first:
            final = self.folder / MODEL
            self.engine.module.model.save_pretrained(final)
            self.tokenizer.save_pretrained(final)
            files.fsync_below(final)
            accuracy = self.best if self.best >= 0 else None  # without validation items there is none
            facts = {"steps": self.total, "best_step": self.best_step, "valid_accuracy": accuracy}
            files.write_json(self.folder / FINISHED, {**facts, "users": len(self.sources.users), **self.meta})
        self.ranks.barrier()


def make_objective(model: RecformerModel, job: RecformerJob, tokenizer: PreTrainedTokenizerBase) -> Objective:
    """The training loss of a model; its masked-LM head is the backbone's own where there is one."""
    words, config = model.backbone.get_input_embeddings(), model.backbone.config
    eps = getattr(config, "layer_norm_eps", 1e-12)
    head = MaskedLMHead(config.hidden_size, words.embedding_dim, words.num_embeddings, eps)
    if job.settings.pretrain.mlm_weight and not head.load_pretrained(resolve(job.settings.backbone)):
        log.info("%s has no masked-LM head: a new one is trained", job.settings.backbone)
    stage, temperature = job.settings.pretrain, job.settings.temperature
    return Objective(model, head, stage, temperature, tokenizer.pad_token_id)


@torch.no_grad()
def accuracy_of(objective: Objective, sources: Sources, batches: BatchMaker) -> float | None:
    """In-batch accuracy on the sources' validation items; None if they have none. Every rank calls this.

    Counted, and divided at the end: as many hits are a tie on any number of ranks, and not better by a rounding error.
    """
    model, stage, hits, seen = objective.model.eval(), objective.stage, 0, 0
    parts = Parts(model, objective.pad_token, stage)
    for pairs in batches_of(sources.valid, stage.batch_size):
        batch = batches(pairs, [0])
        histories, next_items = encode(model, batch.plain, parts).chunk(2)
        numbers = batch.numbers.to(parts.device)
        found = item_contrast(histories, next_items, numbers, objective.temperature, stage.duplicates == "mask")[1]
        hits, seen = hits + int(found.sum()), seen + len(found)
    hits, seen = (sum(each) for each in zip(*Ranks.current().gather((hits, seen)), strict=True))
    return hits / seen if seen else None


def pretrain(job: RecformerJob) -> dict[str, Any]:
    """Run stage-PT to its end, or say what it found if it is finished; every rank calls this."""
    if not job.finished("pretrain"):
        Pretraining(job, make_accelerator(job.settings, job.settings.pretrain)).loop()
    return files.read_json(job.pretrain_folder / FINISHED)


if __name__ == "__main__":
    run_main(lambda: run_stage(__doc__, "pretrain", pretrain), "stage-PT")
