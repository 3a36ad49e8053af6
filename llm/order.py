"""Data order as a pure function of (seed, epoch, global index).

Invariants:
- What step t of a run sees depends on nothing but the seed and t: to resume is to know t.
- The global batch is decided first and dealt out to the ranks after, so it is the same on any number of them.
"""

from functools import lru_cache

import numpy as np


class Order:
    """``size`` samples, shuffled anew every epoch, ``batch`` of them a step; a batch may span two epochs.

    Args:
        size: of an epoch, at least 1.
        batch: samples a step, over all ranks.
        seed: of the shuffling.
    """

    def __init__(self, size: int, batch: int, seed: int) -> None:
        self.size, self.batch, self.seed = size, batch, seed
        self._epoch = lru_cache(maxsize=2)(self._permutation)

    def samples(self, step: int) -> np.ndarray:
        """[batch] sample numbers of step ``step``."""
        places = np.arange(step * self.batch, (step + 1) * self.batch)
        epochs, within = np.divmod(places, self.size)
        return np.array([self._epoch(int(epoch))[place] for epoch, place in zip(epochs, within, strict=True)])

    def _permutation(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.size)


def dealt(samples: np.ndarray, rank: int, size: int) -> np.ndarray:
    """The part of a global batch that rank ``rank`` of ``size`` works on; ranks differ by one sample at most."""
    return samples[rank::size]


def mixed_length_order(lengths: np.ndarray, seed: int, epoch: int, batch: int, pool: int = 16) -> list[np.ndarray]:
    """Batches of sample numbers for rows that are padded, not packed.

    Like lengths are together, but rows are mixed anew each epoch: a batch of neighbours, of one kind of text or of
    one user's time, would pull the weights its own way.

    Args:
        lengths: [samples] in tokens.
        seed: of the shuffling.
        epoch: the same samples come in another order every epoch.
        batch: samples a batch.
        pool: batches whose samples are sorted by length together.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    mixed, batches = rng.permutation(len(lengths)), []
    for begin in range(0, len(lengths), pool * batch):
        own = mixed[begin : begin + pool * batch]
        by_length = own[np.argsort(lengths[own], kind="stable")]
        batches += [by_length[start : start + batch] for start in range(0, len(own), batch)]
    return [batches[index] for index in rng.permutation(len(batches))]
