"""stage-FT1 and stage-FT2 of RECFORMER on a target domain, on any number of ranks.

``recalign pretrain RECIPE``, or
``accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 -m llm.recformer.finetune
--config recipe.yaml key=value``

stage-FT1 encodes all items before every epoch; the loss is a full softmax over that table, and the best (model, table)
by validation NDCG@10 is kept. stage-FT2 begins with these, keeps the table (or trains it along) and goes on with the
sequences. Where the paper is silent: each stage has a fresh optimizer and a rate that falls over its own epochs, and a
history has one item at least.
"""

import logging
import math
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from llm.recformer.batches import SequenceMaker, TokenSequences
from llm.recformer.config import RecformerFinetuneConfig
from llm.recformer.encode import encode_items
from llm.recformer.engine import Engine, make_accelerator, mean_over_ranks
from llm.recformer.job import FINISHED, RecformerJob
from llm.recformer.model import RecformerModel, load_recformer
from llm.recformer.objective import Parts, encode
from llm.recformer.recommender import VECTORS, RecformerRecommender, evaluate_on_all_ranks
from llm.recformer.start import run_stage
from llm.recformer.text import item_tokens
from llm.recformer.tuning import choose_tuned
from rec.data.prepared import Prepared
from rec.evaluation import Metrics, require_cutoffs, save_ranks, some_instances
from rec.items import load_vectors, save_vectors
from rec.linear_cross_entropy import linear_cross_entropy
from rec.negatives import require_negatives
from rec.protocol import Protocol, preset
from rec.runtime import files
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.progress import progress
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import StopFile

log = logging.getLogger(__name__)

MODEL, STOP_METRIC = "model", "NDCG@10"
StageName = Literal["FT1", "FT2"]


class FullSoftmax(nn.Module):
    """-log softmax over all items of cos(s, x) / τ, against a table that is fixed unless ``train_table``.

    Args:
        model: the encoder.
        table: [N, D] item vectors.
        stage: how it is trained.
        pad_token: id of [PAD].
        train_table: whether the table has gradients.
    """

    def __init__(
        self,
        model: RecformerModel,
        table: Tensor,
        stage: RecformerFinetuneConfig,
        pad_token: int,
        train_table: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.stage, self.pad_token = model, stage, pad_token
        self.table = nn.Parameter(table.clone(), requires_grad=train_table)

    def forward(self, sequences: TokenSequences, targets: Tensor, share: float) -> tuple[Tensor, None]:
        """The mean over targets [B] (rows of the table) times ``share``: the mean over ranks is then the batch's."""
        states = encode(self.model, sequences, Parts(self.model, self.pad_token, self.stage))
        states = F.normalize(states, dim=-1) / self.model.config.temperature
        table = F.normalize(self.table, dim=-1)
        return linear_cross_entropy(states, table, targets.to(states.device)) * share, None


class Prefixes:
    """One random prefix of each user's training part an epoch, as (history, next item)."""

    def __init__(self, data: Prepared, stage: RecformerFinetuneConfig) -> None:
        self.stage, self.sequence = stage, data.sequence.numpy()
        begins, ends = data.offsets[:-1].numpy(), data.train_ends.numpy()
        kept = ends - begins >= 2
        self.begins, self.ends = begins[kept], ends[kept]
        if not len(self.begins):
            raise UserError(f"{data.folder} leaves nothing to fine-tune on: no user has two training interactions")
        size = Ranks.current().size
        if len(self.begins) < size:
            raise UserError(
                f"{data.folder} has {len(self.begins)} users with two training interactions, fewer than"
                f" llm.recformer.processes={size}"
            )
        self.count = max(size, round(stage.users_per_epoch * len(self.begins)))
        self.steps = -(-self.count // stage.batch_size)
        # A last batch that has not a row for every rank is left out.
        self.steps -= self.steps > 1 and 0 < self.count % stage.batch_size < size

    def batch(self, epoch: int, step: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Histories and item numbers of the next items of one global batch."""
        rng = np.random.default_rng([self.stage.seed, 5, epoch])
        users = rng.permutation(len(self.begins))[: self.count]
        draws = rng.random(len(users))
        size = self.stage.batch_size
        own = slice(step * size, (step + 1) * size)
        begins, ends = self.begins[users[own]], self.ends[users[own]]
        targets = begins + 1 + (draws[own] * (ends - begins - 1)).astype(np.int64)
        histories = [self.sequence[begin:end] for begin, end in zip(begins.tolist(), targets.tolist(), strict=True)]
        return histories, self.sequence[targets]


class Stage:
    """One stage in its folder; one instance a rank.

    Args:
        name: FT1 refreshes the table, FT2 does not.
        job: the recipe.
        data: the target domain.
        model: what to begin with.
        tokenizer: the model's.
        table: [N, D] what to begin with; None for stage-FT1, which encodes it.
        accelerator: from ``make_accelerator``.
    """

    def __init__(
        self,
        name: StageName,
        job: RecformerJob,
        data: Prepared,
        model: RecformerModel,
        tokenizer: PreTrainedTokenizerBase,
        table: Tensor | None,
        accelerator: Accelerator,
    ) -> None:
        self.name, self.job, self.data, self.tokenizer = name, job, data, tokenizer
        self.stage, self.ranks, self.run = job.settings.finetune, Ranks.current(), RunFolder(job.run)
        self.folder = job.finetune_folder / name
        choose_tuned(model, self.stage)
        tokens = item_tokens(data, job.settings.text, tokenizer, job.tokens)
        self.maker = SequenceMaker(tokens, job.settings.size, tokenizer.cls_token_id)
        self.prefixes = Prefixes(data, self.stage)
        self.epochs = self.stage.epochs if name == "FT1" else self.stage.fixed_epochs
        model.to(accelerator.device)
        if table is None:  # until ``loop`` encodes it, or restores the one of a checkpoint
            table = torch.zeros(data.n_items, model.config.hidden_size)
        train_table = name == "FT2" and self.stage.train_table
        self.epochs *= train_table or self.stage.tune_layers != "none"
        loss = FullSoftmax(model, table.to(accelerator.device), self.stage, tokenizer.pad_token_id, train_table)
        self.total = self.epochs * self.prefixes.steps
        rates = {"table": self.stage.table_lr}
        self.engine = Engine(loss, self.stage, job.settings, self.total, accelerator, rates) if self.epochs else None
        self.loss = loss
        keep = self.stage.keep_checkpoints, self.stage.keep_checkpoint_every
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.ranks, *keep)
        self.stop = StopFile(job.run, self.ranks)
        self.meta = {"config_hash": job.identity("finetune"), **job.inputs([data])}
        self.best, self.best_epoch = -1.0, -1
        # Patience goes by trained epochs alone: what a stage begins with is good before anything is tuned.
        self.peak, self.waited = -1.0, 0
        self.best_weights: dict[str, Tensor] = {}
        self.valid_rows = some_instances(data, "valid", self.stage.valid_users)

    def loop(self) -> None:
        """Train until validation stops rising; the best model and table are in ``model`` and in the vectors' file."""
        done, steps = self._begin(), self.prefixes.steps
        with progress(f"stage-{self.name}", self.total, self.ranks.is_first) as advance:
            for step in range(done, self.total):
                epoch = step // steps
                if self.waited >= self.stage.patience:
                    break
                if step % steps == 0 and step and self.name == "FT1":  # the first epoch's is there already
                    self._refresh_table(epoch)
                row = self._step(step, epoch)
                if (step + 1) % steps == 0 and self._is_judged(epoch):
                    row |= {f"valid_{name}": value for name, value in self._judge(epoch).items()}
                if self.ranks.is_first:
                    self.run.log(f"{self.name.lower()}_step", step=step, epoch=epoch, **row)
                    speed = row["tokens"] / row["seconds"]
                    status = f"loss {row['loss']:.3f}  best {STOP_METRIC} {self.best:.4f}  {speed:,.0f} tokens/s"
                    advance(step + 1, status)
                # After the log, which a kill in between would lose a line of.
                stopping = step + 1 < self.total and self.stop.agreed()
                if stopping or (step + 1) % self.stage.checkpoint_every == 0:
                    self.engine.save(self.checkpoints, step + 1, self._state(), self.meta)
                if stopping:
                    raise self.stop.stopped(f"after step {step + 1} of stage-{self.name}")
        self._finish()

    def _begin(self) -> int:
        """Restore the newest checkpoint, or judge what training begins with; the steps that are done."""
        found = self.engine.resume(self.checkpoints, self.meta) if self.engine else None
        if found is None:
            if self.name == "FT1":
                self._refresh_table(0)
            self._judge(-1)
            return 0
        done, state = found
        for name in ("best", "best_epoch", "peak", "waited"):
            setattr(self, name, state[name])
        self.best_weights = state["weights"]
        if "table" in state:
            with torch.no_grad():
                self.loss.table.copy_(state["table"])
        log.info("resuming stage-%s after step %d", self.name, done)
        return done

    def _is_judged(self, epoch: int) -> bool:
        return (epoch + 1) % self.stage.evaluate_every == 0 or epoch + 1 == self.epochs

    def _state(self) -> dict[str, Any]:
        state = {
            "best": self.best, "best_epoch": self.best_epoch, "peak": self.peak, "waited": self.waited,
            "weights": self.best_weights,
        }  # fmt: skip
        # DeepSpeed gives another number of ranks what has an optimizer state, and nothing else.
        return state | ({"table": self.loss.table.detach().cpu()} if self.engine.sharded else {})

    def _refresh_table(self, epoch: int) -> None:
        """Encode all items with the model as it is now."""
        begin = time.monotonic()
        table = encode_items(self.loss.model, self.maker, Parts(self.loss.model, self.loss.pad_token, self.stage))
        with torch.no_grad():
            self.loss.table.copy_(table)
        if self.ranks.is_first:
            seconds = time.monotonic() - begin
            self.run.log("table", step=epoch, items=len(table), tokens=len(self.maker.tokens.ids), seconds=seconds)

    def _step(self, step: int, epoch: int) -> dict[str, float]:
        begin = time.monotonic()
        histories, items = self.prefixes.batch(epoch, step % self.prefixes.steps)
        own = np.arange(self.ranks.rank, len(histories), self.ranks.size)
        sequences = self.maker([histories[row] for row in own])
        share = self.ranks.size * len(own) / len(histories)
        loss, _ = self.engine.update(step, sequences, torch.from_numpy(items[own] - 1), share)
        loss, tokens = mean_over_ranks([loss, len(sequences.ids)], self.engine.device)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step}: lower llm.recformer.finetune.lr")
        return {"loss": loss, "tokens": round(tokens * self.ranks.size), "seconds": time.monotonic() - begin}

    def evaluate(self, part: Literal["valid", "test"]) -> dict[str, Metrics]:
        """Validation as the recipe says, or the test under its protocols. Every rank calls this."""
        model, stage = self.loss.model, self.stage
        parts = Parts(model, self.loss.pad_token, stage)
        scorer = RecformerRecommender(model, self.loss.table.detach(), self.maker, parts)
        protocols, rows = {"valid": stage.evaluate.protocol}, self.valid_rows
        if part == "test":
            protocols = {name: self._protocol(name) for name in stage.protocols}
            rows = some_instances(self.data, "test", stage.test_users)
        return evaluate_on_all_ranks(scorer, self.data, part, protocols, stage.evaluate.batch_size, rows)

    def _protocol(self, name: str) -> Protocol:
        """A preset as the recipe has it."""
        told: dict[str, Any] = {"cutoffs": self.stage.evaluate.cutoffs}
        told |= {"cold_targets": self.stage.cold_targets} if self.stage.cold_targets else {}
        return preset(name).model_copy(update=told)

    def _judge(self, epoch: int) -> dict[str, float]:
        """Validation figures of the model with the table that it was trained against."""
        if not len(self.valid_rows):
            raise UserError(f"{self.data.folder} has no validation part to stop by: prepare it with one")
        figures = self.evaluate("valid")["valid"].summary()
        if math.isnan(figures[STOP_METRIC]):
            raise UserError(
                "none of the validation items that stage-FT1 and FT2 stop by occurs in training: raise"
                " llm.recformer.finetune.valid_users, or set cold_targets=rank"
            )
        value = figures[STOP_METRIC]
        if value > self.best:
            self.best, self.best_epoch = value, epoch
            self.best_weights = {name: own.detach().cpu().clone() for name, own in self.loss.state_dict().items()}
        if epoch >= 0:
            self.peak, self.waited = max(self.peak, value), 0 if value > self.peak else self.waited + 1
        return figures

    def _finish(self) -> None:
        self.loss.load_state_dict(self.best_weights)
        tested = self.evaluate("test") if self.name == "FT2" or self.stage.test_first_stage else {}
        if self.ranks.is_first:
            self.loss.model.save_pretrained(self.folder / MODEL)
            self.tokenizer.save_pretrained(self.folder / MODEL)
            source = {"model": str(self.folder / MODEL), "kind": f"RECFORMER, item table of stage-{self.name}"}
            ids = self.data.items["item_id"].to_pylist()
            save_vectors(self.folder / VECTORS, ids, self.loss.table.detach().cpu(), source)
            for protocol, metrics in tested.items():
                save_ranks(metrics, self.folder / f"ranks-{protocol}.safetensors")
            test = {name: metrics.summary() for name, metrics in tested.items()}
            facts = {"best_epoch": self.best_epoch, f"valid_{STOP_METRIC}": self.best, "test": test}
            facts["protocols"] = {name: self._protocol(name).of_run(self.data, "train").described() for name in tested}
            files.fsync_below(self.folder / MODEL)
            files.write_json(self.folder / FINISHED, {**facts, **self.meta})
        self.ranks.barrier()


def finetune(job: RecformerJob) -> dict[str, Any]:
    """Run what is not finished of stage-FT1 and stage-FT2; every rank calls this. Returns both stages' facts."""
    settings = job.settings
    folders = {name: job.finetune_folder / name for name in ("FT1", "FT2")}
    done = job.finished("finetune")
    if len(done) < len(folders):
        # First, so that ranks know of each other when they open the data.
        accelerator = make_accelerator(settings, settings.finetune)
        data = job.open(job.data)
        _check(job, data)
        for name, folder in folders.items():
            if folder not in done:
                begin = folders["FT1"] if name == "FT2" else job.pretrain_folder
                Stage(name, job, data, *_beginning(job, begin, data), accelerator).loop()
    return {name: files.read_json(folder / FINISHED) for name, folder in folders.items()}


def _check(job: RecformerJob, data: Prepared) -> None:
    """Raise a UserError for what would only fail at the end."""
    stage = job.settings.finetune
    require_cutoffs(stage.evaluate, data, "llm.recformer.finetune.evaluate.cutoffs")
    for protocol in (stage.evaluate.protocol, *map(preset, stage.protocols)):
        require_negatives(protocol, data, "test")


def _beginning(
    job: RecformerJob, folder: Path, data: Prepared
) -> tuple[RecformerModel, PreTrainedTokenizerBase, Tensor | None]:
    """The model that a stage begins with, and the table if the stage before it has one.

    Raises:
        UserError: if stage-PT belongs to the recipe and is not finished, or read something else than there is now.
    """
    settings = job.settings
    torch.manual_seed(settings.finetune.seed)
    if folder == job.pretrain_folder:
        if settings.pretrain is None:
            return *load_recformer(settings), None
        if not job.finished("pretrain"):
            raise UserError(f"{folder} is not finished: run stage-PT first, or leave llm.recformer.pretrain out")
    saved = settings.model_copy(update={"backbone": str(folder / MODEL)})
    table = folder / VECTORS
    return *load_recformer(saved), load_vectors(table, data) if table.exists() else None


if __name__ == "__main__":
    run_main(lambda: run_stage(__doc__, "finetune", finetune), "stage-FT")
