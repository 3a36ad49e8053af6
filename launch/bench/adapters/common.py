"""What the adapters share: the command line, a prepared folder's sequences, the stopwatch, the evaluation.

Item numbers are the prepared folder's, from 1; 0 is padding.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch

PARTS = {"train": 0, "valid": 1, "test": 2}
HIDDEN, BLOCKS, HEADS, FEED_FORWARD = 64, 2, 2, 64
WARMUP_BATCHES, WARMUP_SECONDS, LEAST_BATCHES = 3, 5.0, 3
EVALUATION_PASSES = 5


def parse(description, losses, batch_size, extend=lambda parser: None):
    """The command line that every adapter has; the working folder becomes a temporary one.

    Args:
        description: of the adapter.
        losses: names of the losses it can train with, the default first.
        batch_size: the peer's own default, or its fastest here.
        extend: adds options of this adapter.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--loss", choices=losses, default=losses[0])
    parser.add_argument("--max-length", type=int, default=50)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60, help="time batches for about that long")
    parser.add_argument("--epochs", type=int, help="train that many epochs instead of timing batches")
    parser.add_argument("--evaluate", action="store_true", help="with --epochs: rank the held-out items")
    parser.add_argument("--patience", type=int, help="with --evaluate: end after so many epochs without a better one")
    parser.add_argument("--train-seconds", type=float, help="with --epochs: begin no epoch after so much training")
    parser.add_argument("--seen", choices=("rank", "mask"), default="rank", help="items of the history as candidates")
    parser.add_argument("--time-evaluation", action="store_true", help="time the peer's own evaluation instead")
    parser.add_argument("--out", type=Path, help="write the result there too")
    extend(parser)
    arguments = parser.parse_args()
    sys.argv[1:] = []  # RecBole reads it again
    arguments.data = arguments.data.resolve()
    arguments.out = arguments.out and arguments.out.resolve()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    np.random.seed(arguments.seed)
    arguments.scratch = tempfile.TemporaryDirectory()
    os.chdir(arguments.scratch.name)  # the peers drop logs and checkpoints where they are started
    return arguments


@dataclass
class Sequences:
    """A prepared folder.

    Attributes:
        items: [interactions] item numbers, sorted by user and time.
        users: [interactions] user numbers from 0.
        offsets: [users + 1] where each user's part of ``items`` begins.
        part: [interactions] 0 train, 1 validation target, 2 test target, 3 neither.
        n_items: size of the catalog.
    """

    items: np.ndarray
    users: np.ndarray
    offsets: np.ndarray
    part: np.ndarray
    n_items: int

    @classmethod
    def load(cls, folder):
        """Read ``interactions.parquet`` (and the size of ``items.parquet``, if it is there)."""
        table = parquet.read_table(folder / "interactions.parquet")
        users, items = (table[name].to_numpy().astype(np.int64) for name in ("user", "item"))
        offsets = np.concatenate([[0], np.cumsum(np.bincount(users))])
        if "part" in table.column_names:
            part = table["part"].to_numpy().astype(np.int8)
        else:
            part = np.zeros(len(items), np.int8)
            part[offsets[1:] - 2], part[offsets[1:] - 1] = PARTS["valid"], PARTS["test"]
        catalog = folder / "items.parquet"
        n_items = parquet.read_metadata(catalog).num_rows if catalog.exists() else int(items.max())
        return cls(items, users, offsets, part, n_items)

    @property
    def positions(self):
        """[interactions] the place of each in its user's sequence, from 0."""
        return np.arange(len(self.items)) - self.offsets[self.users]

    @property
    def is_leave_one_out(self):
        """Whether each user's last is the test item, the one before the validation item, the rest for training."""
        expected = np.zeros_like(self.part)
        expected[self.offsets[1:] - 2], expected[self.offsets[1:] - 1] = PARTS["valid"], PARTS["test"]
        return bool((self.part == expected).all())

    def training_windows(self, length):
        """[M, length] the last items of each user with two or more training items, left-padded with 0."""
        counts = np.bincount(self.users[self.part == PARTS["train"]], minlength=len(self.offsets) - 1)
        keep = counts >= 2  # a user's training items come first
        return self._windows(self.offsets[:-1][keep], self.offsets[:-1][keep] + counts[keep], length)

    def targets_per_epoch(self, length):
        """How many items an epoch over ``training_windows`` predicts."""
        return int((self.training_windows(length + 1)[:, :-1] > 0).sum())

    def histories(self, targets, length):
        """[B, length] what precedes the interactions ``targets`` [B] (positions in ``items``), left-padded with 0."""
        return self._windows(self.offsets[self.users[targets]], targets, length)

    def targets(self, split):
        """[M] positions in ``items`` of the targets of a split."""
        return np.flatnonzero(self.part == PARTS[split])

    def _windows(self, begins, ends, length):
        index = ends[:, None] - np.arange(length, 0, -1)
        return torch.from_numpy(np.where(index >= begins[:, None], self.items[index.clip(0)], 0))


class Stopwatch:
    """Times training batches: a short warm-up that does not count, then until the time is over."""

    def __init__(self, seconds):
        self.seconds, self.done = seconds, False
        self.created, self.started, self.seen = time.perf_counter(), None, 0
        self.batches, self.elapsed, self.processor = 0, 0.0, 0.0

    def tick(self):
        """To be called after each batch; returns whether to stop."""
        now = time.perf_counter()
        self.seen += 1
        if self.started is None:
            if self.seen >= WARMUP_BATCHES or now - self.created > WARMUP_SECONDS:
                self.started, self.processor_before = now, time.process_time()
        else:
            self.batches, self.elapsed = self.batches + 1, now - self.started
            self.processor = time.process_time() - self.processor_before
            self.done = self.batches >= LEAST_BATCHES and self.elapsed >= self.seconds
        return self.done

    def watch(self, batches):
        """Pass ``batches`` on until the time is over."""
        for batch in batches:
            yield batch
            if self.tick():
                return

    def figures(self, batches_per_epoch):
        """What was measured."""
        per_batch = self.elapsed / self.batches
        return {
            "seconds_per_batch": per_batch,
            "batches_per_epoch": batches_per_epoch,
            "batches_timed": self.batches,
            "seconds_per_epoch": per_batch * batches_per_epoch,
            "share_of_epoch_measured": self.batches / batches_per_epoch,
            "processors_used": self.processor / self.elapsed,
        }


def time_passes(work):
    """The median of a few passes after one that warms up, as recalign's own side takes it."""
    work()
    passes = []
    for _ in range(EVALUATION_PASSES):
        started = time.perf_counter()
        work()
        passes.append(time.perf_counter() - started)
    return statistics.median(passes)


@torch.no_grad()
def evaluate(score, data, split, arguments, batch=256):
    """HR@10 and NDCG@10 of the held-out items among all items; equal scores share the mean of their places.

    Args:
        score: from left-padded histories [B, L] to scores [B, items], column i for item number i + 1.
        data: the sequences.
        split: "valid" or "test".
        arguments: the command line's ``max_length`` and ``seen``.
        batch: targets at a time.
    """
    positions, ranks = data.targets(split), []
    for chunk in np.array_split(positions, max(1, -(-len(positions) // batch))):
        scores = score(data.histories(chunk, arguments.max_length)).float()
        if scores.isnan().any():
            raise FloatingPointError("scores are not a number: the model has diverged")
        target = torch.from_numpy(data.items[chunk])[:, None] - 1
        own = scores.gather(1, target)
        if arguments.seen == "mask":
            longest = int((chunk - data.offsets[data.users[chunk]]).max())
            seen = data.histories(chunk, longest)
            padded = torch.cat([scores.new_zeros(len(scores), 1), scores], dim=1)
            scores = padded.scatter(1, seen, float("-inf"))[:, 1:].scatter(1, target, own)
        ranks.append(1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2)
    ranks = torch.cat(ranks).double()
    hits = (ranks <= 10).double()
    return {"HR@10": float(hits.mean()), "NDCG@10": float((hits / torch.log2(1 + ranks)).mean())}


class Journal:
    """Training epoch by epoch; with ``--evaluate`` the epoch that validates best is tested.

    Args:
        arguments: the command line.
        data: the sequences.
        score: as in ``evaluate``.
        module: its weights are the model.
    """

    def __init__(self, arguments, data, score, module):
        self.arguments, self.data, self.score, self.module = arguments, data, score, module
        self.epochs, self.best, self.best_epoch, self.weights, self.spent = [], -1.0, 0, None, 0.0

    def begin(self):
        """Before each epoch."""
        self.module.train()
        self.started = time.perf_counter()

    def end(self):
        """After each epoch: validate, which is not timed."""
        seconds = time.perf_counter() - self.started
        self.spent += seconds
        line = {"epoch": len(self.epochs) + 1, "train_seconds": seconds, "spent": self.spent}
        self.epochs.append(line)
        if self.arguments.evaluate:
            line["valid"] = self._evaluate("valid")
            if line["valid"]["NDCG@10"] > self.best:
                self.best, self.best_epoch = line["valid"]["NDCG@10"], line["epoch"]
                self.weights = {name: value.clone() for name, value in self.module.state_dict().items()}
        sys.stderr.write(json.dumps(line) + "\n")

    @property
    def done(self):
        """Whether to train no further epoch."""
        arguments, count = self.arguments, len(self.epochs)
        waited = arguments.patience is not None and count - self.best_epoch >= arguments.patience
        late = arguments.train_seconds is not None and self.spent >= arguments.train_seconds
        return count >= arguments.epochs or waited or late

    def result(self):
        """What happened, and the test of the best epoch."""
        per_epoch = self.spent / len(self.epochs)
        result = {"seconds_per_epoch": per_epoch, "train_seconds": self.spent, "epochs": self.epochs}
        if self.arguments.evaluate:
            self.module.load_state_dict(self.weights)
            result |= {"best_epoch": self.best_epoch, "test": self._evaluate("test"), "seen": self.arguments.seen}
        return result

    def _evaluate(self, split):
        self.module.eval()
        return evaluate(self.score, self.data, split, self.arguments)


def autocast(arguments):
    """The precision of a plain training loop."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.precision == "bf16")


def numbering(own, n_items):
    """[items + 1] from item numbers to a peer's own, 0 if it has none.

    Args:
        own: the item number of each of the peer's numbers from 1.
        n_items: size of the catalog.
    """
    mapping = torch.zeros(n_items + 1, dtype=torch.long)
    mapping[torch.as_tensor(own)] = torch.arange(1, len(own) + 1)
    return mapping


def renumber(histories, mapping):
    """Left-padded histories in a peer's own numbers, without the items that it does not know."""
    rows = mapping[histories]
    return rows.gather(1, (rows > 0).long().argsort(dim=1, stable=True))


def in_catalog_order(scores, mapping):
    """Scores [B, own numbers from 1] as [B, items]; an item that the peer does not know has -inf."""
    return torch.cat([scores.new_full((len(scores), 1), float("-inf")), scores], dim=1)[:, mapping[1:]]


def finish(arguments, peer, distribution, figures):
    """Print the result as one line of JSON, the last on standard output, and write it to ``--out``."""
    versions = {"python": platform.python_version()}
    for name in (distribution, "torch", "numpy"):
        versions[name] = importlib.metadata.version(name)
    settings = ("loss", "precision", "max_length", "batch_size", "dropout", "learning_rate", "threads", "seed")
    result = {
        "peer": peer,
        "data": arguments.data.name,
        **{name: getattr(arguments, name) for name in settings},
        "hidden": HIDDEN,
        "blocks": BLOCKS,
        "heads": HEADS,
        **figures,
        "load_average": os.getloadavg()[0],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": versions,
    }
    line = json.dumps(result)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    sys.stdout.write(line + "\n")
