"""Train a recommender: full softmax cross-entropy, early stopping on validation NDCG@10, exact resume."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rec.batches import TrainWindows
from rec.config import RecConfig
from rec.data.prepared import Prepared
from rec.evaluation import evaluate
from rec.item_encoder import IDTable, ItemEncoder
from rec.losses import linear_cross_entropy
from rec.models import MODELS
from rec.models.base import SequenceRecommender
from rec.runtime import files
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.progress import progress
from rec.runtime.runfolder import RunFolder

log = logging.getLogger(__name__)

MODEL, STOP_METRIC = "model", "NDCG@10"


def build_model(
    config: RecConfig, data: Prepared, make_items: Callable[[], ItemEncoder] | None = None
) -> SequenceRecommender:
    """An untrained recommender with the item encoder that ``make_items`` makes, by default an ID table.

    Its weights are a function of ``config.train.seed``.
    """
    torch.manual_seed(config.train.seed)
    items = make_items() if make_items else IDTable(data.n_items, config.sasrec.dim)
    return MODELS[config.model](config.sasrec, items)


def train(
    model: SequenceRecommender, data: Prepared, config: RecConfig, run: RunFolder, title: str
) -> SequenceRecommender:
    """Train until validation NDCG@10 stops rising, and return the best model, in evaluation mode.

    The best model is saved under ``model`` in the run folder. Called again on the same folder it goes on from the
    last checkpoint, or returns the finished model.
    """
    final = run.path / MODEL
    if (run.path / "finished.json").exists():
        return SequenceRecommender.from_pretrained(final)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    state = _State(model, data, config, run)
    first = state.resume()
    windows = TrainWindows(data, model.config.max_length, config.train.batch_size)
    device = next(model.parameters()).device
    with progress(title, config.train.epochs) as advance:
        for epoch in range(first, config.train.epochs):
            if state.out_of_patience:
                break
            begin, losses = time.monotonic(), []
            torch.manual_seed(int(hash_of([config.train.seed, epoch]), 16) % 2**63)  # dropout
            model.train()
            for inputs, targets in windows.epoch(config.train.seed, epoch):
                inputs, targets = inputs.to(device), targets.to(device)
                valid = inputs > 0
                states, table = model(inputs)[valid], model.items.table()[1:]
                loss = linear_cross_entropy(states, table, targets[valid] - 1)
                state.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                state.optimizer.step()
                losses.append(loss.detach())
            seconds = time.monotonic() - begin
            mean_loss = float(torch.stack(losses).mean())
            if not math.isfinite(mean_loss):
                raise UserError(
                    f"the loss of {title} is {mean_loss} in epoch {epoch}: lower the learning rate"
                    f" ({config.train.lr:g}); {run.path} keeps the last good checkpoint"
                )
            state.after_epoch(epoch, mean_loss, seconds)
            advance(epoch + 1, f"loss {mean_loss:.3f}  best {STOP_METRIC} {state.best:.4f}")
    state.finish(final)
    return SequenceRecommender.from_pretrained(final)


class _State:
    """What a recommender's training is made of, between two epochs."""

    def __init__(self, model: SequenceRecommender, data: Prepared, config: RecConfig, run: RunFolder) -> None:
        self.model, self.data, self.config, self.run = model, data, config, run
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=config.train.lr, betas=(0.9, 0.98), weight_decay=config.train.weight_decay
        )
        self.best, self.best_epoch, self.waited = 0.0, -1, 0
        self.best_weights = self._weights()
        self.checkpoints = Checkpoints(run.path / "checkpoints", keep_last=1)
        self.meta = {"config_hash": hash_of(config), "data_hash": data.meta["content_hash"]}

    @property
    def out_of_patience(self) -> bool:
        return self.waited >= self.config.train.patience

    def resume(self) -> int:
        """Restore the newest checkpoint if there is one; returns the first epoch to run."""
        found = self.checkpoints.resume(self.meta)
        if found is None:
            # A model that comes trained must not lose to its own first epoch.
            self.best = evaluate(self.model, self.data, "valid", self.config.evaluate)[STOP_METRIC]
            return 0
        checkpoint, saved = found
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best, self.best_epoch, self.waited = saved["best"], saved["best_epoch"], saved["waited"]
        self.best_weights = saved["best_weights"]
        log.info("resuming %s after epoch %d", self.run.path, checkpoint.step)
        return checkpoint.step

    def after_epoch(self, epoch: int, loss: float, seconds: float) -> None:
        """Validate, remember the best weights, write metrics and, now and then, a checkpoint."""
        train, row = self.config.train, {"loss": loss, "seconds": seconds}
        if (epoch + 1) % train.evaluate_every == 0:
            metrics = evaluate(self.model, self.data, "valid", self.config.evaluate)
            row |= metrics.summary()
            if metrics[STOP_METRIC] > self.best:
                self.best, self.best_epoch, self.waited = metrics[STOP_METRIC], epoch, 0
                self.best_weights = self._weights()
            else:
                self.waited += 1
        self.run.log("epoch", step=epoch, **row)
        if (epoch + 1) % train.checkpoint_every == 0:
            self.checkpoints.save(epoch + 1, self._saved(), self.meta)

    def finish(self, folder: Path) -> None:
        """Save the best weights and mark the run as finished."""
        self.model.load_state_dict(self.best_weights)
        self.model.save_pretrained(folder)
        facts = {"best_epoch": self.best_epoch, f"valid_{STOP_METRIC}": self.best}
        files.write_json(self.run.path / "finished.json", facts)

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def _saved(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
            "best_epoch": self.best_epoch,
            "waited": self.waited,
            "best_weights": self.best_weights,
        }
