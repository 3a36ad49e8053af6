"""Which (x, y) the samples of a step are: a pure function of (seed, step), whoever asks and whenever.

A recommender knows the pairs that it was fitted to by their ids, whatever the text says, so their p(y|x,s) tells texts
apart hardly at all. Users can therefore be set aside: their pairs reward the LLM, and no recommender is fitted to them
until alignment is over.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from align.config import MainJob
from rec.data.prepared import Prepared
from rec.runtime.errors import UserError


@dataclass(frozen=True)
class Pair:
    """One training pair.

    Attributes:
        user: user number.
        items: item numbers of the history x, at most the recommender's maximum length, oldest first.
        target: item number of y.
    """

    user: int
    items: list[int]
    target: int


@dataclass(frozen=True)
class Turns:
    """Which steps are one generator's, where ``several`` of them take turns at stretches of ``stretch`` steps.

    Attributes:
        number: of this generator, from 0.
        several: how many there are.
        stretch: steps whose batches one call of vLLM generates, at most.
    """

    number: int
    several: int
    stretch: int

    def has(self, step: int) -> bool:
        """Whether this generator writes the batch of ``step``."""
        return (step // self.stretch) % self.several == self.number

    def end(self, step: int) -> int:
        """Where a call that begins with ``step`` ends at the latest, exclusive; alone, it need not begin a stretch."""
        return step + self.stretch - (step % self.stretch if self.several > 1 else 0)

    def next(self, step: int) -> int:
        """The first of its steps that is ``step`` or later."""
        while not self.has(step):
            step += self.stretch - step % self.stretch
        return step


class PairOrder:
    """All (x, y) of the training parts, in a new random order each epoch.

    Args:
        data: the prepared data; only training interactions are used.
        reach: items of a history that are kept, the last ones: what the recommender reads.
        seed: of the order.
    """

    def __init__(self, data: Prepared, reach: int, seed: int) -> None:
        self.data, self.reach, self.seed = data, reach, seed
        spans = zip(data.offsets[:-1].tolist(), data.train_ends.tolist(), strict=True)
        # The first item of a history has nothing before it.
        self.targets = np.concatenate([np.arange(begin + 1, end) for begin, end in spans])
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def pair(self, ordinal: int) -> Pair:
        """The pair of sample ``ordinal``."""
        epoch, place = divmod(ordinal, len(self.targets))
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.targets))
        index = int(self.targets[self._order[place]])
        user = int(torch.searchsorted(self.data.offsets, index, right=True)) - 1
        begin = max(int(self.data.offsets[user]), index - self.reach)
        return Pair(user, self.data.sequence[begin:index].tolist(), int(self.data.sequence[index]))


@dataclass(frozen=True)
class Task:
    """What a sample is for.

    Attributes:
        ordinal: number of the sample in the run.
        pair: its (x, y).
        rewards: whether it trains the LLM.
        fits: whether it trains the recommender.
    """

    ordinal: int
    pair: Pair
    rewards: bool
    fits: bool


class StepOrder:
    """The samples of every trainer step.

    Without users set aside these are ``batch_size`` pairs that do both, as in the paper; with them as many of theirs,
    which reward, and as many of the others, which the recommender is fitted to.

    Args:
        data: the prepared data.
        reward_users: share of users that are set aside.
        reach: items of a history that are kept, the last ones: what the recommender reads.
        batch_size: pairs a step of each kind.
        seed: of the order and of the choice of users.
    """

    def __init__(self, data: Prepared, reward_users: float, reach: int, batch_size: int, seed: int) -> None:
        aside = set_aside(data, reward_users, seed)
        self.batch_size = batch_size
        self.fitting = PairOrder(data.without(aside), reach, seed)
        self.rewarding = PairOrder(data.without(~aside), reach, seed) if reward_users else None

    def tasks(self, step: int) -> list[Task]:
        """The samples of ``step``, in the order of their ordinals."""
        kinds = [(self.fitting, True, True)]
        if self.rewarding is not None:
            kinds = [(self.rewarding, True, False), (self.fitting, False, True)]
        first = step * self.batch_size
        found = [
            (order.pair(first + place), rewards, fits)
            for order, rewards, fits in kinds
            for place in range(self.batch_size)
        ]
        return [Task(step * len(found) + place, *task) for place, task in enumerate(found)]


def training_data(job: MainJob, data: Prepared) -> Prepared:
    """The data that a main job trains on: all of it, or that of ``train_users``."""
    return data.without(_drawn(data, 1 - job.train_users, job.rec.train.seed)) if job.train_users < 1 else data


def set_aside(data: Prepared, share: float, seed: int) -> Tensor:
    """[users] whether a user only rewards: ``share`` of those who have a training pair, one at least of each kind.

    Raises:
        UserError: if ``share`` is not 0 and fewer than two users have a training pair.
    """
    return _drawn(data, share, seed) if share else torch.zeros(data.n_users, dtype=torch.bool)


def _drawn(data: Prepared, share: float, seed: int) -> Tensor:
    able = torch.nonzero(data.train_ends - data.offsets[:-1] > 1).squeeze(1).numpy()
    if len(able) < 2:
        raise UserError(f"{data.folder} has {len(able)} users with a training pair, it takes two to tell them apart")
    count = min(max(1, round(share * len(able))), len(able) - 1)
    drawn = torch.zeros(data.n_users, dtype=torch.bool)
    drawn[torch.from_numpy(np.random.default_rng([seed, len(able)]).permutation(able)[:count])] = True
    return drawn
