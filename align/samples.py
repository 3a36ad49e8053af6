"""The sample log: what the generator hands to the trainer, one file a trainer step, in order.

Invariants:
- ``batch-N.parquet`` holds exactly the samples that step N trains on, in the order of their ordinals; it is written
  whole, once, and never changed. A sample is therefore never lost, repeated or reordered, whichever job dies when.
- ``batch-N.sha256`` is there before it. Not a byte is read that it does not vouch for: parquet itself notices damage
  late or never.
- A generator's place in the run is the first of its steps without a file; the trainer's is its step. Neither is stored.
"""

import hashlib
import itertools
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rec.runtime import files
from rec.runtime.arrow_files import table_bytes
from rec.runtime.errors import UserError

SCHEMA_VERSION = b"4"
WAITED_FOR_GENERATOR = "for the generator to write"
TEXT = pa.struct(
    {"seed": pa.int64(), "token_ids": pa.list_(pa.int32()), "logprobs": pa.list_(pa.float32()), "text": pa.string()},
)
SCHEMA = pa.schema(
    {
        "ordinal": pa.int64(),
        "user": pa.int32(),
        "items": pa.list_(pa.int32()),
        "target": pa.int32(),
        "rewards": pa.bool_(),
        "fits": pa.bool_(),
        "places": pa.list_(pa.int32()),
        "prompts": pa.list_(pa.list_(pa.int32())),
        "draws": pa.list_(pa.list_(TEXT)),
        "others": pa.list_(pa.struct({"place": pa.int32(), "text": pa.string()})),
        "log_p_y_given_xs": pa.list_(pa.float64()),
        "log_p_y_given_x": pa.float64(),
        "version": pa.int32(),
        "version_step": pa.int32(),
    },
    metadata={b"schema_version": SCHEMA_VERSION},
)


@dataclass(frozen=True)
class Text:
    """One text s about one item, as it was drawn.

    Attributes:
        seed: of its sampling; texts of one batch that have the same are one and the same, in several histories.
        token_ids: its tokens, the end-of-sequence token included if there is one.
        logprobs: log p of each of them when it was drawn.
        text: the tokens as a string.
    """

    seed: int
    token_ids: list[int]
    logprobs: list[float]
    text: str


@dataclass(frozen=True)
class Other:
    """A text that an item without a fresh one was read with, instead of its stored one.

    Attributes:
        place: which of the sample's ``items``.
        text: what was said of it.
    """

    place: int
    text: str


@dataclass(frozen=True)
class Sample:
    """One (x, y) with k times the texts of its fresh items, and everything else that Algorithm 1 needs.

    Attributes:
        ordinal: its number in the run.
        user: user number.
        items: item numbers of x, oldest first.
        target: item number of y.
        rewards: whether it trains the LLM; one that does not has one draw.
        fits: whether it trains the recommender.
        places: [n] which of ``items`` got fresh texts, ascending.
        prompts: [n] token ids of the prompt about each of them.
        draws: [k][n] their texts; draws are independent of each other.
        others: texts of items that are not fresh, the same in every draw.
        log_p_y_given_xs: [k] log p(y|x,s) of each draw under the recommender of ``version``.
        log_p_y_given_x: log p(y|x) under the frozen recommender.
        version: snapshot that wrote and scored it.
        version_step: trainer steps that snapshot had finished.
    """

    ordinal: int
    user: int
    items: list[int]
    target: int
    rewards: bool
    fits: bool
    places: list[int]
    prompts: list[list[int]]
    draws: list[list[Text]]
    others: list[Other]
    log_p_y_given_xs: list[float]
    log_p_y_given_x: float
    version: int
    version_step: int


class SampleLog:
    """The sample log in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def append(self, step: int, samples: list[Sample]) -> None:
        """Write the batch of one step; does nothing if a predecessor already wrote it."""
        target = self.path_of(step)
        if target.exists():
            return
        content = table_bytes(pa.Table.from_pylist([_row(sample) for sample in samples], SCHEMA))
        files.write_text(_checksum(target), hashlib.sha256(content).hexdigest())
        files.write_bytes(target, content)

    def next_step(self, own: Callable[[int], bool] = lambda step: True) -> int:
        """The first step that has no batch, of those that are somebody's ``own``."""
        names = (re.fullmatch(r"batch-(\d+)\.parquet", path.name) for path in self.folder.glob("batch-*"))
        written = {int(name[1]) for name in names if name}
        return next(step for step in itertools.count() if own(step) and step not in written)

    def ready_from(self, step: int) -> int:
        """How many batches, ``step``'s and those after it, are there without a gap."""
        return next(count for count in itertools.count() if not self.path_of(step + count).exists())

    def read(self, step: int) -> list[Sample]:
        """The batch of ``step``.

        Raises:
            FileNotFoundError: if it is not written yet.
            UserError: if the file cannot be read, is damaged or of another schema version.
        """
        path = self.path_of(step)
        checksum = _checksum(path)
        try:
            content = path.read_bytes()
            expected = checksum.read_bytes() if checksum.exists() else b""
        except FileNotFoundError:
            raise
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error}") from error
        if expected != hashlib.sha256(content).hexdigest().encode():
            raise UserError(
                f"{path} is damaged, it does not match {checksum.name}: bring back both, or start over with --fresh"
            )
        table = parquet.read_table(pa.BufferReader(content))
        found = (table.schema.metadata or {}).get(b"schema_version")
        if found != SCHEMA_VERSION:
            raise UserError(f"{path} has schema version {found}, this program reads {SCHEMA_VERSION}")
        return [_sample(row) for row in table.to_pylist()]

    def wait(self, step: int, timeout_s: float, stop: Callable[[], bool] = lambda: False) -> float | None:
        """Wait until the batch of ``step`` is there; returns the seconds waited, or None if ``stop`` says so.

        Raises:
            TimeoutError: naming the file that did not come.
        """
        begin = time.monotonic()
        while True:
            if stop():
                return None
            if self.path_of(step).exists():
                return time.monotonic() - begin
            if time.monotonic() - begin > timeout_s:
                raise TimeoutError(f"waited {timeout_s:.0f} s {WAITED_FOR_GENERATOR} {self.path_of(step)}")
            time.sleep(0.01)

    def path_of(self, step: int) -> Path:
        """The file of the batch of ``step``."""
        return self.folder / f"batch-{step:08d}.parquet"


def _checksum(batch: Path) -> Path:
    return batch.with_suffix(".sha256")


def _row(sample: Sample) -> dict[str, Any]:
    """As ``dataclasses.asdict``, without its copy of every token."""
    draws = [[vars(text) for text in draw] for draw in sample.draws]
    return vars(sample) | {"draws": draws, "others": [vars(other) for other in sample.others]}


def _sample(row: dict[str, Any]) -> Sample:
    draws = [[Text(**text) for text in draw] for draw in row.pop("draws")]
    return Sample(draws=draws, others=[Other(**other) for other in row.pop("others")], **row)
