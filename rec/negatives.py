"""The sampled candidates of evaluation: a function of the protocol's seed, the same for every model and batch size."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from rec.data.prepared import Prepared
from rec.protocol import Part, Protocol
from rec.runtime.errors import UserError

BLOCK_CELLS = 2**25
# After so many items that a user has already: where few popular ones are most of the weight, it could go on for ever.
REJECTIONS = 20


def draw_negatives(protocol: Protocol, data: Prepared, part: Part) -> Tensor:
    """[M, n] int32 item numbers for the M instances of ``part``: distinct, never the target, never what is excluded.

    By popularity, an item without training interactions counts as if it had one: every user must get all negatives.

    Raises:
        UserError: if the catalog has too few items for a user.
    """
    rng = np.random.default_rng([protocol.negatives_seed, {"valid": 0, "test": 1}[part]])
    weights = (
        np.ones(data.n_items) if protocol.negatives_from == "uniform" else data.train_counts[1:].clamp(min=1).numpy()
    )
    cumulative = np.cumsum(weights / weights.sum())
    drawn = [_draw_block(taken, protocol.negatives, cumulative, rng) for taken in _taken(protocol, data, part)]
    return torch.from_numpy(np.concatenate(drawn)) if drawn else torch.zeros(0, protocol.negatives, dtype=torch.int32)


def require_negatives(protocol: Protocol, data: Prepared, part: Part) -> None:
    """Raise the UserError that ``draw_negatives`` would raise, without drawing."""
    if protocol.candidates == "sampled":
        for _ in _taken(protocol, data, part):
            pass


def _taken(protocol: Protocol, data: Prepared, part: Part) -> Iterator[np.ndarray]:
    """[m, N + 1] which items are no negatives of an instance, for one block of ``part`` after the other."""
    block = max(1, BLOCK_CELLS // (data.n_items + 1))
    for users, ends in zip(*(every.split(block) for every in data.instances(part)), strict=True):
        taken = np.zeros((len(users), data.n_items + 1), dtype=bool)
        until = data.offsets[users + 1] if protocol.negatives_exclude == "everything" else ends + 1
        own, _ = data.windows(users, until, len(data.sequence))
        np.put_along_axis(taken, own.numpy(), True, axis=1)
        free = data.n_items - taken[:, 1:].sum(1)
        if len(users) and free.min() < protocol.negatives:
            user = int(users[int(free.argmin())])
            raise UserError(
                f"{protocol.negatives} negatives cannot be drawn for user number {user} of {data.folder}: only"
                f" {int(free.min())} of {data.n_items} items are left; ask for fewer, or rank all items"
            )
        yield taken


def _draw_block(taken: np.ndarray, count: int, cumulative: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[m, count] item numbers; marks them in ``taken``."""
    result = np.zeros((len(taken), count), dtype=np.int32)
    for nth in range(count):
        missing = np.arange(len(taken))
        for _ in range(REJECTIONS):
            items = np.searchsorted(cumulative, rng.random(len(missing)) * cumulative[-1], side="right")
            items = np.minimum(items, len(cumulative) - 1) + 1
            fine = ~taken[missing, items]
            result[missing[fine], nth] = items[fine]
            taken[missing[fine], items[fine]] = True
            missing = missing[~fine]
            if not len(missing):
                break
        for row in missing:
            item = _draw_free(taken[row, 1:], cumulative, rng)
            result[row, nth] = item
            taken[row, item] = True
    return result


def _draw_free(taken: np.ndarray, cumulative: np.ndarray, rng: np.random.Generator) -> int:
    """The number of an item that is not ``taken`` [N], by the free items' own weights."""
    own = np.cumsum(np.where(taken, 0.0, np.diff(cumulative, prepend=0.0)))
    free = np.flatnonzero(~taken)
    # Above every item before the first free one, and never past the last free one.
    place = np.searchsorted(own, rng.random() * own[-1], side="right")
    return int(min(place, free[-1])) + 1
