"""Which (x, y) is the n-th sample of a run: a pure function of (seed, n), whoever asks and whenever."""

from dataclasses import dataclass

import numpy as np
import torch

from rec.data.prepared import Prepared


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


class PairOrder:
    """All (x, y) of the training parts, in a new random order each epoch.

    Args:
        data: the prepared data; only training interactions are used.
        max_length: longest history.
        seed: of the order.
    """

    def __init__(self, data: Prepared, max_length: int, seed: int) -> None:
        self.data, self.max_length, self.seed = data, max_length, seed
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
        begin = max(int(self.data.offsets[user]), index - self.max_length)
        return Pair(user, self.data.sequence[begin:index].tolist(), int(self.data.sequence[index]))
