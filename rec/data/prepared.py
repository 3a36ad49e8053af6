"""A prepared folder in memory: one flat tensor of item numbers, cut into users by offsets."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from rec.data.prepare import INTERACTIONS, ITEMS, META
from rec.runtime import files
from rec.runtime.errors import UserError

Split = Literal["valid", "test"]


@dataclass(frozen=True)
class Prepared:
    """Sequences and items of one data set, leave-one-out.

    Of a user's n interactions the first n-2 are for training, the n-1st is the validation target, the last the
    test target; the validation item belongs to the test history.

    Attributes:
        folder: where it was read from.
        meta: its ``meta.json``.
        items: table of ``item_id`` and text columns; row i describes item number i + 1.
        sequence: [interactions] item numbers from 1, sorted by user and time.
        offsets: [users + 1] where each user's part of ``sequence`` begins.
    """

    folder: Path
    meta: dict[str, Any]
    items: pa.Table
    sequence: Tensor
    offsets: Tensor

    @classmethod
    def load(cls, folder: Path) -> "Prepared":
        """Read a prepared folder.

        Raises:
            UserError: if it is none, or a file of it is missing, unreadable or belongs to another folder.
        """
        if not (folder / META).is_file():
            raise UserError(f"{folder} is no prepared folder (no {META}); make one with 'recalign prepare'")
        try:
            meta = files.read_json(folder / META)
            items = parquet.read_table(folder / ITEMS)
            interactions = parquet.read_table(folder / INTERACTIONS, columns=["user", "item"])
            sizes = np.bincount(interactions["user"].to_numpy())
            sequence = torch.from_numpy(interactions["item"].to_numpy().astype(np.int64))
            found = {"users": len(sizes), "items": len(items), "interactions": len(sequence)}
            expected = {name: meta["counts"][name] for name in found}
            if found != expected:
                raise ValueError(f"its tables hold {found}, its {META} says {expected}")
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} is damaged: {reason}; delete it and prepare again") from error
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        return cls(folder, meta, items, sequence, torch.from_numpy(offsets))

    @property
    def n_users(self) -> int:
        """Number of users."""
        return len(self.offsets) - 1

    @property
    def n_items(self) -> int:
        """Number of items; item numbers are 1 to ``n_items``."""
        return len(self.items)

    @cached_property
    def train_ends(self) -> Tensor:
        """[users] where each user's training part ends (exclusive), an index into ``sequence``."""
        return self.offsets[1:] - 2

    def targets(self, split: Split) -> Tensor:
        """[users] the held-out item of each user."""
        return self.sequence[self._target_index(split)]

    def histories(self, split: Split, users: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """What precedes the held-out item: ``windows`` up to it."""
        return self.windows(users, self._target_index(split)[users], max_length)

    def windows(self, users: Tensor, ends: Tensor, max_length: int) -> tuple[Tensor, Tensor]:
        """The last ``max_length`` items before ``ends``, right-padded with 0.

        Args:
            users: [B] user numbers.
            ends: [B] exclusive ends, as indices into ``sequence``.
            max_length: longest window.

        Returns:
            [B, L] item numbers, L the longest window of these, and [B] lengths.
        """
        starts = torch.maximum(self.offsets[users], ends - max_length)
        lengths = ends - starts
        steps = torch.arange(int(lengths.max()))
        inside = steps < lengths[:, None]
        index = (starts[:, None] + steps).clamp(max=len(self.sequence) - 1)
        return self.sequence[index] * inside, lengths

    def _target_index(self, split: Split) -> Tensor:
        return self.offsets[1:] - (2 if split == "valid" else 1)
