"""Training batches: windows over all training interactions, little padding, an order set by seed and epoch."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rec.data.prepared import Prepared
from rec.runtime.errors import UserError

POOL = 16


class TrainWindows:
    """Every training interaction but each user's first is a target exactly once an epoch.

    A user's training part is cut, from its end, into windows of ``max_length`` inputs; the item after each input
    is its target. Windows of similar length go into one batch, so that little is padding.

    Args:
        data: the prepared data.
        max_length: inputs in a window, at most.
        batch_size: windows in a batch.

    Raises:
        UserError: if there is nothing to learn from: no user has two training interactions.
    """

    def __init__(self, data: Prepared, max_length: int, batch_size: int) -> None:
        self.data, self.max_length, self.batch_size = data, max_length, batch_size
        lengths = (data.train_ends - data.offsets[:-1] - 1).numpy()
        counts = np.maximum(0, -(-lengths // max_length))
        if not counts.any():
            raise UserError(f"{data.folder} leaves nothing to train on: no user has more than 3 interactions")
        self.users = torch.from_numpy(np.repeat(np.arange(data.n_users), counts))
        nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        # Exclusive ends of the inputs; the last target is the last training item.
        self.ends = data.train_ends[self.users] - 1 - torch.from_numpy(nth * max_length)
        self.lengths = torch.minimum(self.ends - data.offsets[self.users], torch.tensor(max_length))

    def __len__(self) -> int:
        return -(-len(self.users) // self.batch_size)

    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of inputs [B, L] and targets [B, L], both 0 where padded, in the order of (seed, epoch)."""
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(self.users))
        batches = []
        for pool in np.split(order, range(self.batch_size * POOL, len(order), self.batch_size * POOL)):
            by_length = pool[np.argsort(self.lengths[pool].numpy(), kind="stable")]
            batches += np.split(by_length, range(self.batch_size, len(by_length), self.batch_size))
        for index in rng.permutation(len(batches)):
            chosen = torch.from_numpy(batches[index])
            inputs, lengths = self.data.windows(self.users[chosen], self.ends[chosen], self.max_length)
            # A window that is full may begin after the user's first item: windows() cut it to the same start.
            shifted = (self.ends[chosen] - lengths)[:, None] + torch.arange(inputs.shape[1]) + 1
            targets = self.data.sequence[shifted.clamp(max=len(self.data.sequence) - 1)] * (inputs > 0)
            yield inputs, targets
