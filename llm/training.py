"""The pretraining loop: language modelling and recommendation, one or both, on any engine, with exact resume.

Invariants:
- Step t is a function of the weights, the seed and t alone: batches, negatives, learning rate and λ are computed from
  t. What a checkpoint holds beside the engine's state is the step, and the best validation loss with its weights.
- Losses that are no numbers end the run before anything is saved: the last good checkpoint stays.
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from llm.corpus import LanguageBatch, PackedBatches
from llm.joint import PairBatch
from llm.recommendation import RecommendationTask
from llm.update import Engine, Part
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.errors import UserError
from rec.runtime.progress import progress
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import StopFile

log = logging.getLogger(__name__)

STEP = "lm_step"


class LanguageSource(Protocol):
    """Where language batches come from."""

    def parts(self, step: int) -> list[LanguageBatch]:
        """This rank's share of step ``step``, a batch a forward pass."""


@dataclass(frozen=True)
class Plan:
    """What is trained on, and how long.

    Attributes:
        steps: at most.
        learning_rate: of a step.
        language: L1's batches; None for LMRec -lm.
        tasks: L2's.
        weight: λ of a step.
        validate_every: steps.
        validation_users: most pairs of a validation.
        patience: steps without a better validation loss before training stops.
        patience_from: the step from which on these are counted.
        checkpoint_every: steps.
        flops_per_token: of language modelling, for the MFU.
        flops_of_pairs: of histories and items, which have no output layer.
        peak_flops: of one device.
    """

    steps: int
    learning_rate: Callable[[int], float]
    language: LanguageSource | None
    checkpoint_every: int
    tasks: Sequence[RecommendationTask] = ()
    weight: Callable[[int], float] = field(default=lambda step: 0.0)
    validate_every: int = 1
    validation_users: int = 0
    patience: int = 0
    patience_from: int = 0
    flops_per_token: float = 0.0
    flops_of_pairs: Callable[[PairBatch], float] = field(default=lambda batch: 0.0)
    peak_flops: float = math.inf


class Training:
    """One rank's part of a pretraining run.

    Args:
        plan: what to do.
        engine: with the model.
        run: where metrics and checkpoints go.
        meta: facts that a checkpoint must agree with (hashes of recipe and data).
        title: of the progress bar.
        keep: how many of the newest checkpoints stay, and those of every how many steps for good.
    """

    def __init__(
        self,
        plan: Plan,
        engine: Engine,
        run: RunFolder,
        meta: dict[str, Any],
        title: str,
        keep: tuple[int, int | None] = (1, None),
    ) -> None:
        self.plan, self.engine, self.run, self.meta, self.title = plan, engine, run, meta, title
        self.ranks = Ranks.current()
        self.checkpoints = Checkpoints(run.path / "checkpoints", self.ranks, *keep)
        self.stop = StopFile(run.path, self.ranks)
        self.best, self.best_step, self.best_weights = math.inf, 0, {}
        self.validation = [(task.name, task.validation(plan.validation_users)) for task in plan.tasks]

    def loop(self) -> int:
        """Train to the last step or until patience runs out, from the newest checkpoint; returns the finished steps.

        Raises:
            Stopped: if the run folder holds a stop file; the state after the last step is saved.
        """
        plan, step = self.plan, self._resume()
        with progress(self.title, plan.steps, self.ranks.is_first) as advance:
            while step < plan.steps and not self._out_of_patience(step):
                row = self._update(step)
                step += 1
                if plan.tasks and (step % plan.validate_every == 0 or step == plan.steps):
                    row |= self._validate(step)
                if self.ranks.is_first:
                    self.run.log(STEP, step=step - 1, **row)
                    advance(step, _status(row))
                stopping = step < plan.steps and self.stop.agreed()
                if stopping or step % plan.checkpoint_every == 0:
                    self._save(step)
                if stopping:
                    raise self.stop.stopped(f"after step {step} of pretraining")
        return step

    def best_or_last(self) -> dict[str, Tensor]:
        """The weights of the best validation loss, or without validation the last ones; {} but on rank 0."""
        return self.best_weights if self.plan.tasks else self.engine.weights()

    def _update(self, step: int) -> dict[str, Any]:
        begin, lr, weight = time.monotonic(), self.plan.learning_rate(step), self.plan.weight(step)
        terms, tokens, pairs, flops = self._terms(step, weight)
        losses = self.engine.step([part for _, part, _ in terms], lr)
        totals = dict.fromkeys(name for name, _, _ in terms)
        for (name, _, share), loss in zip(terms, losses, strict=True):
            totals[name] = (totals[name] or 0.0) + share * loss
        summed = self._sums([*totals.values(), flops, float(tokens)])
        found = dict(zip(totals, summed, strict=False))
        norm = self.engine.gradient_norm
        for name, value in {**{f"{name} loss": loss for name, loss in found.items()}, "gradient's norm": norm}.items():
            if not math.isfinite(value):
                raise UserError(
                    f"the {name} is {value} at step {step}: start over with a lower learning rate; the last good"
                    f" checkpoint is in {self.checkpoints.folder}"
                )
        seconds, flops, tokens = time.monotonic() - begin, summed[-2], int(summed[-1])
        rate = tokens / seconds
        mfu = flops / seconds / self.ranks.size / self.plan.peak_flops
        row = {"tokens": tokens, "seconds": seconds, "tokens_per_s": round(rate, 1), "mfu": round(mfu, 4), "lr": lr}
        row["gradient_norm"] = norm
        return {**_named(found), **row, **({"weight": weight, "pairs": pairs} if self.plan.tasks else {})}

    def _terms(self, step: int, weight: float) -> tuple[list[tuple[str, Part, float]], int, int, float]:
        """(name, part, share of the named loss's mean that this part is) of this rank's step; its tokens, the pairs of
        all ranks, and its FLOPs."""
        terms, tokens, found, flops, world = [], 0, 0, 0.0, self.ranks.size
        if self.plan.language is not None:
            batches = self.plan.language.parts(step)
            counts = [batch.tokens for batch in batches]
            whole = sum(counts)
            if isinstance(self.plan.language, PackedBatches):
                whole = self.plan.language.learnt_tokens(step)
            for batch, count in zip(batches, counts, strict=True):
                terms.append(("loss", Part(batch, world * count / whole), count / whole))
            tokens += sum(counts)
            flops += sum(counts) * self.plan.flops_per_token
        for task in self.plan.tasks:
            batches, pairs = task.parts(step)
            found += pairs
            for batch in batches:
                share = len(batch.positives) / pairs
                terms.append((task.name, Part(batch, weight * task.config.terms(pairs) * world * share), share))
                tokens += batch.tokens
                flops += self.plan.flops_of_pairs(batch)
        return terms, tokens, found, flops

    def _validate(self, step: int) -> dict[str, float]:
        """Losses on the validation pairs, and their sum, which patience goes by; keeps the weights of the best."""
        found = {}
        for name, batches in self.validation:
            losses = self.engine.losses([batch for batch, _ in batches])
            found[f"valid_{name}"] = sum(share * loss for (_, share), loss in zip(batches, losses, strict=True))
        found = dict(zip(found, self._sums(list(found.values())), strict=True))
        total = sum(found.values())
        if not math.isfinite(total):
            raise UserError(
                f"the validation loss is {total} after step {step - 1}: start over with a lower learning rate"
            )
        if total < self.best:
            self.best, self.best_step, self.best_weights = total, step, self.engine.weights()
        return found

    def _out_of_patience(self, step: int) -> bool:
        since = max(self.best_step, self.plan.patience_from)
        return bool(self.plan.tasks) and step - since >= self.plan.patience

    def _sums(self, values: list[float]) -> list[float]:
        """Sums over ranks, the same on all of them."""
        if self.ranks.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.engine.device)
        torch.distributed.all_reduce(total)
        return total.tolist()

    def _save(self, step: int) -> None:
        best = {"best": self.best, "best_step": self.best_step, "best_weights": self.best_weights}
        self.checkpoints.save(step, {**self.engine.state(), **best}, self.meta, self.engine.save)

    def _resume(self) -> int:
        # What is not in the engine is the same for all ranks, or rank 0's alone.
        found = self.checkpoints.resume(self.meta, replicated=True)
        if found is None:
            return 0
        checkpoint, saved = found
        self.engine.load(checkpoint, saved)
        self.best, self.best_step, self.best_weights = saved["best"], saved["best_step"], saved["best_weights"]
        log.info("resuming %s after step %d", self.run.path, checkpoint.step)
        return checkpoint.step


def _named(losses: dict[str, float]) -> dict[str, float]:
    """The language model's loss is called ``loss``, a task's by its name behind ``pairs_``."""
    return {name if name == "loss" else f"pairs_{name}": value for name, value in losses.items()}


def _status(row: dict[str, Any]) -> str:
    losses = "  ".join(
        f"{name} {value:.3f}" for name, value in row.items() if name.startswith(("loss", "pairs", "valid"))
    )
    mfu = f", MFU {row['mfu']:.0%}" if row["mfu"] else ""  # 0 where the device's peak is not known
    return f"{losses}  {row['tokens_per_s']:,.0f} tokens/s{mfu}"
