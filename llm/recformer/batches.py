"""Histories as token sequences, newest item first, and the parts in which they go through the encoder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from llm.recformer.config import SizeConfig
from llm.recformer.text import CLS, PADDING, ItemTokens

LIKE, LEAST_SHARE = 0.8, 1 / 8  # of a part's longest sequence, and of its size


@dataclass(frozen=True)
class TokenSequences:
    """Token sequences of B histories without padding, one after the other: "[CLS] newest item … oldest item".

    Attributes:
        ids: [T] token ids.
        types: [T] ``CLS``, ``KEY`` or ``VALUE``.
        items: [T] position of the token's item, 1 the newest, and 0 for [CLS].
        words: [T] number of the token's word, through all sequences; -1 for [CLS].
        offsets: [B + 1].
        labels: [T] the token to predict, -1 where none is; None without masking.
    """

    ids: np.ndarray
    types: np.ndarray
    items: np.ndarray
    words: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[B] tokens of each sequence."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "TokenSequences":
        """The sequences ``rows``, in that order."""
        lengths = self.lengths[rows]
        where = _ranges(self.offsets[rows], lengths)
        flat = {name: value[where] for name, value in vars(self).items() if name != "offsets" and value is not None}
        return replace(self, **flat, offsets=np.cumsum([0, *lengths]))


class SequenceMaker:
    """Turns histories of item numbers into token sequences.

    Args:
        tokens: of the catalog.
        size: how much of a history is read.
        cls_token: id of [CLS].
    """

    def __init__(self, tokens: ItemTokens, size: SizeConfig, cls_token: int) -> None:
        self.tokens, self.size, self.cls_token = tokens, size, cls_token
        self.words_per_item = int(tokens.words.max()) + 1 if len(tokens.words) else 1

    def __call__(self, histories: Sequence[np.ndarray]) -> TokenSequences:
        """``histories``: item numbers from 1, newest last as everywhere else; the text has the newest first."""
        kept = [history[::-1][: self.size.max_items] for history in histories]
        counts = np.array([len(history) for history in kept], dtype=np.int64)
        rows = np.repeat(np.arange(len(kept)), counts)  # [I] sequence of each item
        items = np.concatenate([*kept, np.empty(0, dtype=np.int64)]).astype(np.int64) - 1
        nth = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts) + 1
        lengths = self.tokens.lengths[items]
        where = _ranges(self.tokens.offsets[items], lengths)
        # How manyth token of its sequence each is, [CLS] being the 0th; what lies beyond the limit goes.
        token_rows = np.repeat(rows, lengths)
        per_row = np.bincount(rows, weights=lengths, minlength=len(kept)).astype(np.int64)
        place = np.arange(len(where)) - np.repeat(np.cumsum(per_row) - per_row, per_row) + 1
        inside = place < self.size.max_tokens
        where, token_rows, place = where[inside], token_rows[inside], place[inside]
        item_of_token = np.repeat(np.arange(len(items)), lengths)[inside]
        sizes = 1 + np.minimum(per_row, self.size.max_tokens - 1)
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        target = offsets[token_rows] + place
        total = int(offsets[-1])
        ids = np.full(total, self.cls_token, dtype=np.int64)
        types, positions = np.full(total, CLS, dtype=np.int64), np.zeros(total, dtype=np.int64)
        words = np.full(total, -1, dtype=np.int64)
        ids[target], types[target] = self.tokens.ids[where], self.tokens.types[where]
        positions[target] = nth[item_of_token]
        words[target] = item_of_token * self.words_per_item + self.tokens.words[where]
        return TokenSequences(ids, types, positions, words, offsets)

    def single_items(self, items: np.ndarray) -> TokenSequences:
        """Every item number alone, as a history of length 1: how a catalog is encoded."""
        return self(items[:, None])


@dataclass(frozen=True)
class TokenBatch:
    """Some sequences with padding, as the encoder reads them.

    Attributes:
        rows: [B] which of all sequences these are.
        ids: [B, T].
        types: [B, T]; ``PADDING`` where there is none.
        items: [B, T] positions of items; 0 on padding.
        mask: [B, T] true inside.
        labels: [B, T] the token to predict, -1 where none is; None without masking.
    """

    rows: Tensor
    ids: Tensor
    types: Tensor
    items: Tensor
    mask: Tensor
    labels: Tensor | None = None

    def to(self, device: torch.device) -> "TokenBatch":
        """The same on ``device``."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})


def parts_of(lengths: np.ndarray, part_tokens: int, multiple: int = 1) -> list[np.ndarray]:
    """Rows in parts of like length, the longest first, each of at most ``part_tokens`` tokens with its padding.

    A sequence that is longer than that is a part of its own, and a part that holds an eighth of it takes none that is
    much shorter than its longest. Lengths are rounded up to a ``multiple``.
    """
    padded = -(-lengths // multiple) * multiple
    parts: list[list[int]] = []
    for row in np.argsort(-padded, kind="stable").tolist():
        if parts:
            count, longest = len(parts[-1]), padded[parts[-1][0]]
            is_like = padded[row] >= LIKE * longest or count * longest < LEAST_SHARE * part_tokens
            if is_like and (count + 1) * longest <= part_tokens:
                parts[-1].append(row)
                continue
        parts.append([row])
    return [np.array(part) for part in parts]


def pad(sequences: TokenSequences, rows: np.ndarray, pad_token: int, multiple: int = 1) -> TokenBatch:
    """The sequences ``rows`` as one batch, as long as the longest of them, rounded up to a ``multiple``."""
    lengths = sequences.lengths[rows]
    steps = np.arange(-(-int(lengths.max()) // multiple) * multiple)
    inside = steps < lengths[:, None]
    where = np.minimum(sequences.offsets[rows][:, None] + steps, len(sequences.ids) - 1)

    def fill(values: np.ndarray, padding: int) -> Tensor:
        return torch.from_numpy(np.where(inside, values[where], padding))

    labels = None if sequences.labels is None else fill(sequences.labels, -1)
    return TokenBatch(
        torch.from_numpy(rows),
        fill(sequences.ids, pad_token),
        fill(sequences.types, PADDING),
        fill(sequences.items, 0),
        torch.from_numpy(inside),
        labels,
    )


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """All of [start, start + length) one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)
