"""What the progress bar of a training says, during an epoch too."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rec.runtime.progress import Advance

# Of a long epoch: how often its progress is told, and over how many steps its loss is a mean then.
TELL_EVERY_S, RECENT = 2.0, 100


class EpochProgress:
    """One epoch of the many that a bar counts.

    Args:
        advance: the bar.
        epoch: which one, from 0.
        users: that it trains on.
        best: the best validation figure so far, in words.
    """

    def __init__(self, advance: Advance, epoch: int, users: int, best: str) -> None:
        self.advance, self.epoch, self.users, self.best = advance, epoch, users, best
        self.told = time.monotonic()

    def under_way(self, losses: Sequence[Tensor], batches: int, seconds: float) -> None:
        """After ``losses`` of so many ``batches``; seldom, for reading a loss makes a GPU's queue run empty."""
        if time.monotonic() - self.told >= TELL_EVERY_S:
            self.told, share = time.monotonic(), len(losses) / batches
            self._tell(share, float(torch.stack(losses[-RECENT:]).mean()), seconds, f"epoch {self.epoch + 1}: ")

    def done(self, loss: float, seconds: float, best: str) -> None:
        """The whole epoch, and the best validation figure after it."""
        self.best = best
        self._tell(1.0, loss, seconds)

    def _tell(self, share: float, loss: float, seconds: float, what: str = "") -> None:
        rate = self.users * share / seconds
        self.advance(self.epoch + share, f"{what}{rate:,.0f} users/s  loss {loss:.3f}{self.best}")
