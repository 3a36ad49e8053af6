"""A prepared folder in memory: one flat tensor of item numbers, cut into users by offsets."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from rec.data.prepare import INTERACTIONS, ITEMS, META, USERS, require_schema
from rec.data.splits import CONTEXT, TEST, TRAIN, VALID, leave_one_out
from rec.runtime import files
from rec.runtime.errors import UserError

Split = Literal["valid", "test"]
PART_OF: dict[Split, int] = {"valid": VALID, "test": TEST}


def read_meta(folder: Path) -> dict[str, Any]:
    """A prepared folder's ``meta.json``.

    Raises:
        UserError: if it is none, the file is unreadable, or another version of recalign prepared it.
    """
    if not (folder / META).is_file():
        raise UserError(f"{folder} is no prepared folder (no {META}); make one with 'recalign prepare'")
    with _damage_is_one_line(folder):
        meta = files.read_json(folder / META)
        require_schema(meta, folder)
    return meta


@dataclass(frozen=True)
class Prepared:
    """Sequences, parts and items of one data set.

    A user's training interactions come first. An instance of a split is one target and everything of its user
    before it, whatever its part: with leave-one-out, the validation item belongs to the test history, and instance
    i is user i.

    Attributes:
        folder: where it was read from.
        meta: its ``meta.json``.
        items: table of ``item_id`` and text columns; row i describes item number i + 1.
        sequence: [interactions] item numbers from 1, sorted by user and time.
        offsets: [users + 1] where each user's part of ``sequence`` begins.
        part: [interactions] int8, 0 train, 1 validation target, 2 test target, 3 context: known, but neither
            trained on nor a target; leave-one-out if not given.
    """

    folder: Path
    meta: dict[str, Any]
    items: pa.Table
    sequence: Tensor
    offsets: Tensor
    part: Tensor = field(default=None)

    def __post_init__(self) -> None:
        if self.part is None:
            object.__setattr__(self, "part", torch.from_numpy(leave_one_out(self.offsets.numpy())))

    @classmethod
    def load(cls, folder: Path) -> "Prepared":
        """Read a prepared folder.

        Raises:
            UserError: if it is none, a file of it is missing, unreadable or belongs to another folder, or another
                version of recalign prepared it.
        """
        meta = read_meta(folder)
        with _damage_is_one_line(folder):
            items = parquet.read_table(folder / ITEMS)
            interactions = parquet.read_table(folder / INTERACTIONS, columns=["user", "item", "part"])
            sizes = np.bincount(interactions["user"].to_numpy())
            sequence = torch.from_numpy(interactions["item"].to_numpy().astype(np.int64))
            part = torch.from_numpy(interactions["part"].to_numpy().astype(np.int8))
            found = {"users": len(sizes), "items": len(items), "interactions": len(sequence)}
            expected = {name: meta["counts"][name] for name in found}
            if found != expected:
                raise ValueError(f"its tables hold {found}, its {META} says {expected}")
            offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(sizes)]))
            data = cls(folder, meta, items, sequence, offsets, part)
            if not _is_sound(data):
                raise ValueError(f"the item or part numbers of {INTERACTIONS} make no sense")
        return data

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
        """[users] where each user's training part ends (exclusive), an index into ``sequence``.

        It is the user's offset where nothing of the user is for training.
        """
        trained = torch.cat([torch.zeros(1, dtype=torch.long), (self.part == TRAIN).long().cumsum(0)])
        return self.offsets[:-1] + trained[self.offsets[1:]] - trained[self.offsets[:-1]]

    @cached_property
    def train_counts(self) -> Tensor:
        """[items + 1] training interactions of each item number."""
        return torch.bincount(self.sequence[self.part == TRAIN], minlength=self.n_items + 1)

    @cached_property
    def timestamps(self) -> Tensor:
        """[interactions] seconds since 1970 (or whatever the source counts), int64, read when first asked for.

        Raises:
            UserError: if the file is gone or damaged.
        """
        with _damage_is_one_line(self.folder):
            return torch.from_numpy(self._column(INTERACTIONS, "timestamp").to_numpy().astype(np.int64))

    @cached_property
    def user_ids(self) -> list[str]:
        """[users] the source's ids, read when first asked for.

        Raises:
            UserError: if the file is gone or damaged.
        """
        with _damage_is_one_line(self.folder):
            return self._column(USERS, "user_id").to_pylist()

    def without(self, users: Tensor) -> "Prepared":
        """The same without the training and validation parts of ``users`` [users, bool]: they become context."""
        theirs = torch.repeat_interleave(users, self.offsets.diff())
        known = theirs & ((self.part == TRAIN) | (self.part == VALID))
        return replace(self, part=self.part.masked_fill(known, CONTEXT))

    def instances(self, split: Split) -> tuple[Tensor, Tensor]:
        """What is to be predicted, ordered by user, then time.

        Returns:
            [M] user numbers, and [M] where the targets stand in ``sequence``: the history of an instance is
            everything of its user before that.
        """
        return self._instances[split]

    def targets(self, split: Split) -> Tensor:
        """[M] the item to predict in each instance of the split."""
        return self.sequence[self.instances(split)[1]]

    def repeated(self, split: Split) -> Tensor:
        """[M] whether the target of each instance stands in its own history."""
        owner = torch.repeat_interleave(torch.arange(self.n_users), self.offsets.diff())
        pairs = owner * (self.n_items + 1) + self.sequence
        order = pairs.argsort(stable=True)
        first = torch.ones(len(pairs), dtype=torch.bool)
        first[order[1:]] = pairs[order][1:] != pairs[order][:-1]
        return ~first[self.instances(split)[1]]

    def histories(self, split: Split, rows: Tensor | Sequence[int], max_length: int) -> tuple[Tensor, Tensor]:
        """What precedes the targets of the instances ``rows`` [B] of the split: ``windows`` up to them."""
        users, ends = self.instances(split)
        return self.windows(users[rows], ends[rows], max_length)

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
        steps = torch.arange(int(lengths.max()) if len(lengths) else 0)
        inside = steps < lengths[:, None]
        index = (starts[:, None] + steps).clamp(max=len(self.sequence) - 1)
        return self.sequence[index] * inside, lengths

    @cached_property
    def _instances(self) -> dict[Split, tuple[Tensor, Tensor]]:
        found = {}
        for split, code in PART_OF.items():
            ends = torch.nonzero(self.part == code).squeeze(1)
            found[split] = (torch.searchsorted(self.offsets, ends, right=True) - 1, ends)
        return found

    def _column(self, name: str, column: str) -> pa.ChunkedArray:
        values = parquet.read_table(self.folder / name, columns=[column])[column]
        expected = self.n_users if name == USERS else len(self.sequence)
        if len(values) != expected:
            raise ValueError(f"{name} holds {len(values)} rows, not {expected}")
        return values


def _is_sound(data: Prepared) -> bool:
    """Whether items and parts are in range, and training comes first for every user."""
    in_range = int(data.sequence.min()) >= 1 and int(data.sequence.max()) <= data.n_items
    known = int(data.part.min()) >= TRAIN and int(data.part.max()) <= CONTEXT
    positions = torch.arange(len(data.part))
    before_end = positions < torch.repeat_interleave(data.train_ends, data.offsets.diff())
    return in_range and known and bool(((data.part == TRAIN) == before_end).all())


@contextmanager
def _damage_is_one_line(folder: Path) -> Iterator[None]:
    """Turns what a missing or broken file raises into a UserError that names its folder."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} is damaged: {reason}; delete it and prepare again") from error
