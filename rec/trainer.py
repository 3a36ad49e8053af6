"""Train a recommender: one loop for all models and any number of processes, early stopping, exact resume."""

import itertools
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rec.averaging import WeightAverage
from rec.batches import Windows, fit_counts, make_batches
from rec.build import FINISHED, MODEL, same_data
from rec.config import RecConfig
from rec.data.prepared import Prepared
from rec.epoch_progress import EpochProgress
from rec.evaluation import evaluate, some_instances
from rec.losses import Loss, make_loss
from rec.models.base import Batch, Recommender
from rec.precision import autocast
from rec.runtime import files
from rec.runtime.checkpoint import Checkpoints, restore_rng, rng_state
from rec.runtime.config import hash_of
from rec.runtime.errors import Diverged, UserError
from rec.runtime.progress import progress
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import StopFile

log = logging.getLogger(__name__)

STOP_METRIC = "NDCG@10"


def train(model: Recommender, data: Prepared, config: RecConfig, run: RunFolder, title: str) -> Recommender:
    """Train until validation NDCG@10 stops rising, and return the best model, in evaluation mode.

    The best model is saved under ``model`` in the run folder. Called again on the same folder it goes on from the
    last checkpoint, or returns the finished model. Every process of a process group calls it alike.

    Raises:
        UserError: if there is no validation part to stop by, or the loss or the scores are no numbers any more.
        Stopped: if the run folder holds a stop file; the state after the last step is saved.
    """
    final = run.path / MODEL
    if (run.path / FINISHED).exists():
        if not same_data(files.read_json(run.path / FINISHED), data):
            raise UserError(
                f"{run.path} was trained on other data than {data.folder} holds now: start over with --fresh, or take"
                " another run folder"
            )
        return Recommender.from_pretrained(final)
    if config.train.on == "train" and not len(data.instances("valid")[0]):
        raise UserError(
            f"{data.folder} has no validation part to stop by: prepare it with one, or set rec.train.on=train+valid"
        )
    model.to(device())
    state = _State(model, data, config, run)
    state.resume()
    batches = make_batches(model, data, config.train)
    step = _Step(model, make_loss(config.loss, fit_counts(data, config.train.on)[1:]), config)
    users_per_epoch = len(torch.unique(batches.users))
    with progress(title, config.train.epochs, state.ranks.is_first) as advance:
        for epoch in range(state.epoch, config.train.epochs):
            if state.out_of_patience:
                break
            told = EpochProgress(advance, epoch, users_per_epoch, state.best_in_words)
            mean_loss, seconds = _train_epoch(model, step, batches, state, told)
            if not math.isfinite(mean_loss):
                raise Diverged(
                    f"the loss of {title} is {mean_loss} in epoch {epoch}: lower the learning rate"
                    f" ({config.train.lr:g}); {run.path} keeps the last good checkpoint"
                )
            state.after_epoch(mean_loss, seconds)
            told.done(mean_loss, seconds, state.best_in_words)
    state.finish(final)
    return Recommender.from_pretrained(final)


def _train_epoch(
    model: Recommender, step: "_Step", batches: Windows, state: "_State", told: EpochProgress
) -> tuple[float, float]:
    """What is left of the epoch that is under way; returns its mean loss and its seconds."""
    begin, seed, epoch = time.monotonic() - state.seconds, state.config.train.seed, state.epoch
    steps = len(batches)
    state.begin_epoch()
    model.train()
    for batch in itertools.islice(batches.epoch(seed, epoch), len(state.losses), None):
        state.losses.append(step(batch, state))
        state.after_step()
        if len(state.losses) < steps:
            state.stop_if_asked(time.monotonic() - begin)
            told.under_way(state.losses, steps, time.monotonic() - begin)
    return float(torch.stack(state.losses).mean()), time.monotonic() - begin


class _Loss(nn.Module):
    """The training loss as a forward pass, which is what DDP synchronises and torch.compile compiles."""

    def __init__(self, model: Recommender, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.model.training_loss(batch, self.loss)


class _Step:
    """One optimizer step on a global batch, of which every process takes its rows."""

    def __init__(self, model: Recommender, loss: Loss, config: RecConfig) -> None:
        self.model, self.train, self.ranks = model, config.train, Ranks.current()
        self.device = next(model.parameters()).device
        if config.train.compile:
            model.training_loss = torch.compile(model.training_loss, dynamic=True)
        self.forward: nn.Module = _Loss(model, loss)
        if self.ranks.size > 1:
            self.forward = DistributedDataParallel(self.forward, broadcast_buffers=False)

    def __call__(self, batch: Batch, state: "_State | EpochTimer") -> torch.Tensor:
        """The mean loss over the targets of the global batch."""
        own, share = self._own(batch)
        with autocast(self.device, self.train.precision):
            loss = self.forward(own.to(self.device)) * share
        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.train.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.train.clip_norm)
        state.optimizer.step()
        state.schedule.step()
        total = loss.detach()
        if self.ranks.size > 1:
            torch.distributed.all_reduce(total)
            total /= self.ranks.size
        return total

    def _own(self, batch: Batch) -> tuple[Batch, float]:
        """This process's rows, and the factor that makes DDP's mean over processes a mean over targets."""
        if self.ranks.size == 1:
            return batch, 1.0
        rows = torch.arange(self.ranks.rank, len(batch.users), self.ranks.size)
        total = int((batch.targets > 0).sum())
        if not len(rows):  # a batch smaller than the group: take part, and add nothing
            return Batch(*(value[:1] for value in vars(batch).values())), 0.0
        own = Batch(*(value[rows] for value in vars(batch).values()))
        return own, self.ranks.size * int((own.targets > 0).sum()) / total


class EpochTimer:
    """Training steps without validation, checkpoints or a run folder: what a speed comparison times.

    Attributes:
        targets: items that one epoch predicts.
        places: places of the padded input that one epoch computes.
    """

    def __init__(self, model: Recommender, data: Prepared, config: RecConfig) -> None:
        self.model, self.config = model.to(device()), config
        self.batches = make_batches(model, data, config.train)
        self.step = _Step(model, make_loss(config.loss, fit_counts(data, config.train.on)[1:]), config)
        self.optimizer, self.schedule = _optimizer(model, config)
        cells = [(batch.targets > 0, batch.items) for batch in self.batches.epoch(config.train.seed, 0)]
        self.targets = sum(int(targets.sum()) for targets, _ in cells)
        self.places = sum(items.numel() for _, items in cells)

    def run(self, limit_s: float) -> float:
        """Train for one epoch or ``limit_s`` seconds; the share of an epoch that was done."""
        self.model.train()
        begin = time.monotonic()
        done = 0
        for batch in self.batches.epoch(self.config.train.seed, 0):
            self.step(batch, self)
            done += 1
            if time.monotonic() - begin > limit_s:
                break
        return done / len(self.batches)


def parameter_groups(model: Recommender) -> list[dict[str, Any]]:
    """What is trained, for an optimizer: at its rate, and what has a rate of its own at that."""
    own = [{"params": parameters, "lr": rate} for rate, parameters in model.items.own_rates().items()]
    apart = {parameter for group in own for parameter in group["params"]}
    rest = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter not in apart]
    return [{"params": rest}, *own]


def _optimizer(
    model: Recommender, config: RecConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Adam, and the learning rate's rise over the warm-up steps."""
    train, groups = config.train, parameter_groups(model)
    optimizer = torch.optim.Adam(groups, lr=train.lr, betas=(0.9, 0.98), weight_decay=train.weight_decay, fused=True)
    rise = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, train.warmup_steps)))
    return optimizer, rise


class _State:
    """What a recommender's training is made of, between two steps.

    A checkpoint is named after the optimizer steps behind it; ``losses`` and ``seconds`` are those of the epoch that is
    under way, of which a stop may have cut off the rest.
    """

    def __init__(self, model: Recommender, data: Prepared, config: RecConfig, run: RunFolder) -> None:
        self.model, self.data, self.config, self.run = model, data, config, run
        self.ranks = Ranks.current()
        self.rank_seed = [self.ranks.rank] if self.ranks.size > 1 else []
        self.optimizer, self.schedule = _optimizer(model, config)
        self.average = WeightAverage(model, config.train.ema) if config.train.ema else None
        self.best, self.best_epoch = 0.0, -1
        # Patience goes by trained epochs alone: what begins with vectors is a recommender at once, falls before it
        # learns, and would be cut off while it rises.
        self.peak, self.waited = 0.0, 0
        self.best_weights = self._weights()
        self.epoch, self.losses, self.seconds = 0, [], 0.0
        self.rng: dict[str, Any] | None = None
        self.stop = StopFile(run.path, self.ranks)
        keep = config.train.keep_checkpoints, config.train.keep_checkpoint_every
        self.checkpoints = Checkpoints(run.path / "checkpoints", self.ranks, *keep)
        self.protocol = config.evaluate.protocol.of_run(data, config.train.on)
        self.meta = {"config_hash": hash_of(config), "data_hash": data.meta["content_hash"]}

    @property
    def judged(self) -> Recommender:
        """The model that is validated and kept."""
        return self.average.model if self.average else self.model

    @property
    def stops_early(self) -> bool:
        """Whether there are validation items that are not trained on."""
        return self.config.train.on == "train"

    @property
    def best_in_words(self) -> str:
        """For the progress bar."""
        return f"  best {STOP_METRIC} {self.best:.4f}" if self.stops_early else ""

    @property
    def out_of_patience(self) -> bool:
        return self.waited >= self.config.train.patience

    def resume(self) -> None:
        """Restore the newest checkpoint if there is one, of however many processes."""
        found = self.checkpoints.resume(self.meta, replicated=True)
        if found is None:
            if self.stops_early:  # A model that comes trained must not lose to its own first epoch.
                self.best = self._validate()[STOP_METRIC]
            return
        checkpoint, saved = found
        self.model.load_state_dict(saved["model"])
        if self.average:
            self.average.model.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.best, self.best_epoch = saved["best"], saved["best_epoch"]
        self.peak, self.waited = saved["peak"], saved["waited"]
        self.best_weights = saved["best_weights"]
        self.epoch, self.seconds = saved["epoch"], saved["seconds"]
        self.losses = list(saved["losses"].to(next(self.model.parameters()).device))
        self.rng = rng_state() if self.losses else None
        log.info("resuming %s after step %d, in epoch %d", self.run.path, checkpoint.step, self.epoch)

    def begin_epoch(self) -> None:
        """Dropout is drawn anew for (seed, epoch, rank), or goes on where a stop cut the epoch off."""
        if self.rng is None:
            torch.manual_seed(int(hash_of([self.config.train.seed, self.epoch, *self.rank_seed]), 16) % 2**63)
        else:
            restore_rng(self.rng)

    def stop_if_asked(self, seconds: float) -> None:
        """Save and end, if somebody wants this run to stop; every process calls it after the same step."""
        if self.stop.agreed():
            self.seconds = seconds
            self.save()
            raise self.stop.stopped(f"in epoch {self.epoch}, after step {self.schedule.last_epoch}")

    def save(self) -> None:
        """Write the checkpoint of the steps so far, unless it is there."""
        if not self.checkpoints.holds(self.schedule.last_epoch):
            self.checkpoints.save(self.schedule.last_epoch, self._saved(), self.meta)

    def after_step(self) -> None:
        """Keep up the average of the weights, if there is one."""
        if self.average:
            self.average.update(self.model, self.schedule.last_epoch)

    def after_epoch(self, loss: float, seconds: float) -> None:
        """Validate, remember the best weights, write metrics and, now and then or before a stop, a checkpoint."""
        train, epoch, row = self.config.train, self.epoch, {"loss": loss, "seconds": seconds}
        if self.stops_early and ((epoch + 1) % train.evaluate_every == 0 or epoch + 1 == train.epochs):
            begin = time.monotonic()
            figures = self._validate()
            row |= figures | {"protocol_hash": self.protocol.hash, "evaluation_seconds": time.monotonic() - begin}
            self._judge(figures[STOP_METRIC])
        if self.ranks.is_first:
            self.run.log("epoch", step=epoch, **row)
        self.epoch, self.losses, self.seconds, self.rng = epoch + 1, [], 0.0, None
        if self.epoch % train.checkpoint_every == 0:
            self.save()
        if self.epoch < train.epochs:
            self.stop_if_asked(0.0)

    def _judge(self, value: float) -> None:
        """Keep the weights if they are the best so far, the untrained ones among them."""
        if value > self.best:
            self.best, self.best_epoch = value, self.epoch
            self.best_weights = self._weights()
        self.waited = 0 if value > self.peak else self.waited + 1
        self.peak = max(value, self.peak)

    def finish(self, folder: Path) -> None:
        """Save the best weights, or without validation the last ones, and mark the run as finished."""
        if self.stops_early:
            self.judged.load_state_dict(self.best_weights)
        else:
            self.judged.items.refresh()
        if self.ranks.is_first:
            self.judged.save_pretrained(folder)
            facts = {
                "best_epoch": self.best_epoch,
                f"valid_{STOP_METRIC}": self.best,
                "trained_on": self.config.train.on,
                "data_hash": self.meta["data_hash"],
            }
            files.write_json(self.run.path / FINISHED, facts)
        self.ranks.barrier()

    def _validate(self) -> dict[str, float]:
        """The validation figures; the first process computes them, all of them go by them."""
        self.judged.items.refresh()
        return self.ranks.from_first(self._figures)

    def _figures(self) -> dict[str, float]:
        train = self.config.train
        rows = some_instances(self.data, "valid", train.valid_users)
        # As it is trained: a model that is bf16 in every step need not be float32 in every validation.
        with autocast(next(self.judged.parameters()).device, train.precision):
            return evaluate(self.judged, self.data, "valid", self.config.evaluate, rows, complete=False).summary()

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.judged.state_dict().items()}

    def _saved(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            **({"average": self.average.model.state_dict()} if self.average else {}),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "peak": self.peak,
            "waited": self.waited,
            "best_weights": self.best_weights,
            "epoch": self.epoch,
            "losses": torch.stack(self.losses).cpu() if self.losses else torch.empty(0),
            "seconds": self.seconds,
        }


def device() -> torch.device:
    """Where models are trained and evaluated here: this process's GPU if there is one."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())
