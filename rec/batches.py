"""Training batches: data held as tensors, little padding, an order set by seed and epoch alone.

Every kind covers the training part of the data once an epoch, and no interaction outside it is ever an input or a
target. With several processes each takes every size-th row of the same global batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rec.config import TrainConfig
from rec.data.prepared import Prepared
from rec.models.base import Batch, Recommender
from rec.protocol import TrainedOn
from rec.runtime.errors import UserError

POOL = 16


def fit_ends(data: Prepared, on: TrainedOn) -> Tensor:
    """[users] where the interactions that are trained on end (exclusive), as indices into the sequence.

    ``train+valid`` ends after a user's last validation item: of a user who was held out, that is the whole history.
    """
    if on == "train":
        return data.train_ends
    users, ends = data.instances("valid")
    return data.train_ends.scatter_reduce(0, users, ends + 1, "amax")


def fit_users(data: Prepared, on: TrainedOn) -> Tensor:
    """[users] whether anything of a user is trained on."""
    return fit_ends(data, on) > data.offsets[:-1]


def fit_counts(data: Prepared, on: TrainedOn) -> Tensor:
    """[items + 1] interactions of each item number that are trained on."""
    if on == "train":
        return data.train_counts
    lengths = data.offsets.diff()
    inside = torch.arange(len(data.sequence)) < torch.repeat_interleave(fit_ends(data, on), lengths)
    return torch.bincount(data.sequence[inside], minlength=data.n_items + 1)


@dataclass
class Windows:
    """Stretches of sequences, each with what follows it: ``ends`` [W] are exclusive ends of the inputs."""

    data: Prepared
    users: Tensor
    ends: Tensor
    lengths: Tensor
    batch_size: int

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.users) // self.batch_size)

    def epoch(self, seed: int, epoch: int) -> Iterator[Batch]:
        """The global batches in the order of (seed, epoch). Windows of similar length share a batch."""
        rng = np.random.default_rng([seed, epoch])
        order, lengths = self.choose(rng), self.lengths.numpy()
        batches = []
        for pool in np.split(order, range(self.batch_size * POOL, len(order), self.batch_size * POOL)):
            by_length = pool[np.argsort(lengths[pool], kind="stable")]
            batches += np.split(by_length, range(self.batch_size, len(by_length), self.batch_size))
        for index in rng.permutation(len(batches)):
            yield self.batch(torch.from_numpy(batches[index]), rng)

    def choose(self, rng: np.random.Generator) -> np.ndarray:
        """The windows of one epoch, in random order."""
        return rng.permutation(len(self.users))

    def batch(self, chosen: Tensor, rng: np.random.Generator) -> Batch:
        """One batch of the windows ``chosen`` [B]."""
        raise NotImplementedError

    def inputs(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """[B, L] inputs, right-padded with 0, and [B, L] where they stand in the sequence."""
        starts = self.ends[chosen] - self.lengths[chosen]
        steps = torch.arange(int(self.lengths[chosen].max()))
        places = starts[:, None] + steps
        inside = steps < self.lengths[chosen, None]
        return self.data.sequence[places.clamp(max=len(self.data.sequence) - 1)] * inside, places


class NextItemWindows(Windows):
    """Whole sequences with a target after every input: each training interaction but a user's first is one once.

    A user's training part is cut, from its end, into windows of ``max_length`` inputs.
    """

    @classmethod
    def of(
        cls, data: Prepared, on: TrainedOn, max_length: int, batch_size: int, last: bool = False
    ) -> "NextItemWindows":
        """Windows over the training part, or the ``last`` one of each user alone."""
        return cls(data, *_cut(data, fit_ends(data, on) - 1, max_length, last), batch_size)

    def batch(self, chosen: Tensor, rng: np.random.Generator) -> Batch:
        items, places = self.inputs(chosen)
        after = (places + 1).clamp(max=len(self.data.sequence) - 1)
        return Batch(self.users[chosen], items, self.data.sequence[after] * (items > 0))


class ClozeWindows(Windows):
    """Whole sequences in which some items are masked, and those are the targets (BERT4Rec, 3.6).

    Args:
        mask: the number that stands for a masked item.
        ratio: share of items that are masked, each by itself; one at least in every window.
        last_only: share of windows in which the last item alone is masked, as at inference.
    """

    mask: int
    ratio: float
    last_only: float

    @classmethod
    def of(
        cls,
        data: Prepared,
        on: TrainedOn,
        max_length: int,
        batch_size: int,
        mask: int,
        ratio: float,
        last_only: float,
        last: bool = False,
    ) -> "ClozeWindows":
        """Windows over the training part, or the ``last`` one of each user alone."""
        windows = cls(data, *_cut(data, fit_ends(data, on), max_length, last), batch_size)
        windows.mask, windows.ratio, windows.last_only = mask, ratio, last_only
        return windows

    def batch(self, chosen: Tensor, rng: np.random.Generator) -> Batch:
        items, _ = self.inputs(chosen)
        inside, last = items > 0, self.lengths[chosen] - 1
        masked = torch.from_numpy(rng.random(items.shape) < self.ratio) & inside
        masked[torch.from_numpy(rng.random(len(items)) < self.last_only)] = False
        unmasked = ~masked.any(1)
        masked[unmasked.nonzero()[:, 0], last[unmasked]] = True
        return Batch(self.users[chosen], items.masked_fill(masked, self.mask), items * masked)


class Prefixes(Windows):
    """Every prefix of every training sequence with the one item after it, or some prefixes of each user an epoch."""

    per_user: int | None = None

    @classmethod
    def of(cls, data: Prepared, on: TrainedOn, max_length: int, batch_size: int, per_user: int | None) -> "Prefixes":
        """Prefixes of the training part; ``per_user`` chooses so many at random each epoch, null takes all."""
        counts = (fit_ends(data, on) - data.offsets[:-1] - 1).clamp(min=0)
        users, nth = _count_out(counts)
        ends = data.offsets[users] + nth + 1
        _require_some(data, len(users))
        prefixes = cls(data, users, ends, (nth + 1).clamp(max=max_length), batch_size)
        prefixes.per_user = per_user
        return prefixes

    def __len__(self) -> int:
        if self.per_user is None:
            return super().__len__()
        kept = torch.bincount(self.users).clamp(max=self.per_user).sum()
        return -(-int(kept) // self.batch_size)

    def choose(self, rng: np.random.Generator) -> np.ndarray:
        order = rng.permutation(len(self.users))
        if self.per_user is None:
            return order
        # Count how many of the same user come earlier in the random order; keep the first few.
        users = self.users.numpy()[order]
        by_user = np.argsort(users, kind="stable")
        sizes = np.bincount(users)
        rank = np.empty(len(order), dtype=np.int64)
        rank[by_user] = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return order[rank < self.per_user]

    def batch(self, chosen: Tensor, rng: np.random.Generator) -> Batch:
        items, _ = self.inputs(chosen)
        targets = torch.zeros_like(items)
        targets[torch.arange(len(items)), self.lengths[chosen] - 1] = self.data.sequence[self.ends[chosen]]
        return Batch(self.users[chosen], items, targets)


class Pairs(Windows):
    """Every (user, item) of the training part, as a target without inputs."""

    @classmethod
    def of(cls, data: Prepared, on: TrainedOn, batch_size: int) -> "Pairs":
        """The pairs; a repeat is a pair of its own."""
        counts = fit_ends(data, on) - data.offsets[:-1]
        users, nth = _count_out(counts)
        _require_some(data, len(users))
        return cls(data, users, data.offsets[users] + nth, torch.zeros_like(users), batch_size)

    def batch(self, chosen: Tensor, rng: np.random.Generator) -> Batch:
        targets = self.data.sequence[self.ends[chosen]][:, None]
        return Batch(self.users[chosen], torch.zeros_like(targets), targets)


def make_batches(model: Recommender, data: Prepared, train: TrainConfig) -> Windows:
    """The batches that ``model`` is trained on.

    Raises:
        UserError: if there is nothing to learn from: no user has two training interactions.
    """
    on, size = train.on, train.batch_size
    if model.samples == "pairs":
        return Pairs.of(data, on, size)
    length, last = model.config.max_length, train.windows == "last"
    if model.samples == "prefix":
        return Prefixes.of(data, on, length, size, train.prefixes_per_user)
    if model.samples == "cloze":
        config = model.config
        return ClozeWindows.of(data, on, length, size, data.n_items + 1, config.mask_ratio, config.last_only, last)
    return NextItemWindows.of(data, on, length, size, last)


def _cut(data: Prepared, ends: Tensor, max_length: int, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Users, ends and lengths of windows that cover each user's items before ``ends`` [users], cut from the end.

    ``last`` keeps the one window that ends there.
    """
    counts = -((data.offsets[:-1] - ends).clamp(max=0) // max_length)
    if last:
        counts = counts.clamp(max=1)
    users, nth = _count_out(counts)
    _require_some(data, len(users))
    window_ends = ends[users] - nth * max_length
    return users, window_ends, (window_ends - data.offsets[users]).clamp(max=max_length)


def _count_out(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Each user as often as ``counts`` [users] says, and for each of these the how manyth of the user it is, from 0."""
    users = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return users, torch.arange(len(users)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)


def _require_some(data: Prepared, count: int) -> None:
    if not count:
        raise UserError(f"{data.folder} leaves nothing to train on: its users have too few training interactions")
