"""Which part each interaction belongs to: training, validation, test, or context that is known but never scored."""

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from rec.runtime.config import Section
from rec.runtime.errors import UserError

TRAIN, VALID, TEST, CONTEXT = range(4)
PART_NAMES = ("train", "valid", "test", "context")


class Filters(Section):
    """What is kept of a source, and how it is split."""

    k_core: int = Field(5, ge=0)
    """Drop users and items with fewer interactions, again and again until none is left to drop."""

    min_length: int = Field(3, ge=1)
    """Drop users with fewer interactions after that; leave-one-out needs 3: one each to train, validate and test."""

    repeats: Literal["keep", "drop"] = "keep"
    """A user's later interactions with an item that is already in the sequence."""

    split: Literal["leave-one-out", "ratio", "time", "users"] = "leave-one-out"
    """Each user's last two; each user's last share; everything after a moment; the last of held-out users."""

    valid_fraction: float = Field(0.1, ge=0, lt=1)
    """ratio: of each user's interactions; time: of all interactions; users: of the users."""

    test_fraction: float = Field(0.1, gt=0, lt=1)
    """As ``valid_fraction``."""

    seed: int = Field(0, ge=0)
    """users: which of them are held out."""

    cold_items: Literal["keep", "drop"] = "keep"
    """Validation and test targets whose item no training interaction has; dropped ones become context."""

    @model_validator(mode="after")
    def _agree(self) -> "Filters":
        if self.split == "leave-one-out" and self.min_length < 3:
            raise UserError(f"min_length is {self.min_length}, but split leave-one-out needs at least 3")
        if self.valid_fraction + self.test_fraction >= 1:
            raise UserError("valid_fraction + test_fraction leave nothing to train on; let their sum be less than 1")
        return self


def assign(
    filters: Filters, offsets: np.ndarray, items: np.ndarray, times: np.ndarray
) -> tuple[np.ndarray, dict[str, dict[str, int]]]:
    """The part of each interaction.

    A user's training interactions are always the first ones. A target needs a history: a user's very first
    interaction is never one, it becomes context.

    Args:
        filters: the kind of split.
        offsets: [users + 1] where each user's interactions begin.
        items: [interactions] item numbers, sorted by user and time.
        times: [interactions] seconds.

    Returns:
        [interactions] int8 of ``TRAIN``, ``VALID``, ``TEST``, ``CONTEXT``, and counts for ``meta.json``: ``parts``
        by name, and by ``valid`` and ``test`` the ``cold_targets`` (their item is in no training interaction; kept
        or dropped as ``cold_items`` says) and the ``targets_without_history`` (always dropped).

    Raises:
        UserError: if a part that should exist is empty.
    """
    if filters.split == "leave-one-out":
        part = leave_one_out(offsets)
    elif filters.split == "ratio":
        part = _by_ratio(filters, offsets)
    elif filters.split == "time":
        part = _by_time(filters, times)
    else:
        part = _by_users(filters, offsets)
    first = np.zeros(len(part), dtype=bool)
    first[offsets[:-1]] = True
    without_history = first & ((part == VALID) | (part == TEST))
    counts = {"targets_without_history": _of_targets(part, without_history)}
    part[without_history] = CONTEXT
    known = np.zeros(int(items.max(initial=0)) + 1, dtype=bool)
    known[items[part == TRAIN]] = True
    counts["cold_targets"] = _of_targets(part, ~known[items])
    if filters.cold_items == "drop":
        part[~known[items] & ((part == VALID) | (part == TEST))] = CONTEXT
    counts["parts"] = dict(zip(PART_NAMES, np.bincount(part, minlength=4).tolist(), strict=True))
    _require_parts(filters, counts["parts"])
    return part, counts


def leave_one_out(offsets: np.ndarray) -> np.ndarray:
    """[interactions] int8: of each user's, the last is for testing, the one before for validation."""
    part = np.full(int(offsets[-1]), TRAIN, dtype=np.int8)
    part[offsets[1:] - 2] = VALID
    part[offsets[1:] - 1] = TEST
    return part


def _by_ratio(filters: Filters, offsets: np.ndarray) -> np.ndarray:
    """Each user's share, rounded down; where it is less than one, one, as long as one is left to train (RecBole)."""
    lengths = np.diff(offsets)
    test, valid = (_share(lengths, fraction) for fraction in (filters.test_fraction, filters.valid_fraction))
    test += (test == 0) & (lengths - valid > 1)
    if filters.valid_fraction:
        valid += (valid == 0) & (lengths - test > 1)
    to_end = np.repeat(offsets[1:], lengths) - np.arange(offsets[-1])  # 1 for a user's last
    test, valid = np.repeat(test, lengths), np.repeat(valid, lengths)
    return np.select([to_end <= test, to_end <= test + valid], [TEST, VALID], TRAIN).astype(np.int8)


def _by_time(filters: Filters, times: np.ndarray) -> np.ndarray:
    """A cut is the first moment of the later part, so that equal times always fall on one side."""
    ordered = np.sort(times)
    later = [filters.valid_fraction + filters.test_fraction, filters.test_fraction]
    cuts = [ordered[len(ordered) - max(1, int(_share(len(ordered), share)))] for share in later]
    return np.select([times >= cuts[1], times >= cuts[0]], [TEST, VALID], TRAIN).astype(np.int8)


def _by_users(filters: Filters, offsets: np.ndarray) -> np.ndarray:
    n_users = len(offsets) - 1
    n_test = max(1, int(_share(n_users, filters.test_fraction)))
    n_valid = max(int(filters.valid_fraction > 0), int(_share(n_users, filters.valid_fraction)))
    order = np.random.default_rng(filters.seed).permutation(n_users)
    held_out = np.zeros(n_users, dtype=bool)
    held_out[order[: n_test + n_valid]] = True
    part = np.where(np.repeat(held_out, np.diff(offsets)), CONTEXT, TRAIN).astype(np.int8)
    part[offsets[1:][order[:n_test]] - 1] = TEST
    part[offsets[1:][order[n_test : n_test + n_valid]] - 1] = VALID
    return part


def _share(numbers: np.ndarray | int, fraction: float) -> np.ndarray:
    # 0.29 * 100 is a hair below 29.
    return np.floor(numbers * fraction + 1e-9).astype(np.int64)


def _of_targets(part: np.ndarray, which: np.ndarray) -> dict[str, int]:
    return {"valid": int((which & (part == VALID)).sum()), "test": int((which & (part == TEST)).sum())}


def _require_parts(filters: Filters, counts: dict[str, int]) -> None:
    required = ["train", "test", *(["valid"] if filters.valid_fraction or filters.split == "leave-one-out" else [])]
    for name in required:
        if not counts[name]:
            raise UserError(
                f"split {filters.split!r} leaves the {name} part empty"
                f" ({', '.join(f'{part} {count}' for part, count in counts.items())}); choose another split,"
                " or other fractions or filters"
            )
