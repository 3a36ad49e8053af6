"""What every reader returns, and the checks that readers share."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rec.runtime.errors import UserError


@dataclass(frozen=True)
class RawData:
    """One source, as read.

    Attributes:
        items: ``item_id`` (string, unique) and text columns (string, "" where missing); may lack items.
        interactions: ``user_id`` and ``item_id`` (string, or dictionaries of strings), ``timestamp`` (int64
            seconds), and ``subsecond`` (int64, of any unit) where the source's times are finer than that, in source
            order: it breaks ties of time.
        files: what was read.
        dropped: interactions that the reader left out, counted by reason.
        options: the reader's options that differ from their defaults.
        item_rows: rows of the item file that were left out or changed, counted by reason.
    """

    items: pa.Table
    interactions: pa.Table
    files: list[Path]
    dropped: dict[str, int] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    item_rows: dict[str, int] = field(default_factory=dict)


def find_file(folder: Path, *names: str) -> Path:
    """The first of ``names`` (also with ``.gz``) in ``folder``; ``folder`` may be one of these files itself.

    Raises:
        UserError: if none is there.
    """
    if folder.is_file():
        return folder
    if not folder.exists():
        raise UserError(f"raw data not found: {folder}")
    found = find_optional(folder, *names)
    if found is None:
        raise UserError(f"{folder} holds none of: {', '.join(names)} (also tried .gz)")
    return found


def find_optional(folder: Path, *names: str) -> Path | None:
    """The first of ``names`` (also with ``.gz``) in ``folder``, or None."""
    candidates = [folder / f"{name}{suffix}" for name in names for suffix in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def items_without_text() -> pa.Table:
    """The item table of a source that describes none: ``prepare`` adds every item that is interacted with."""
    return pa.table({"item_id": pa.array([], pa.string())})


def first_line(error: Exception) -> str:
    """What an Arrow error says, without its further lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def require_columns(present: Sequence[str], path: Path, *names: str) -> None:
    """Raise a UserError that lists what is there if one of ``names`` is not."""
    for name in names:
        if name not in present:
            raise UserError(f"{path} has no column {name!r}; it has: {', '.join(present)[:400]}")


def in_one_piece(table: pa.Table) -> pa.Table:
    """The table with one chunk and one dictionary in each dictionary column.

    Tables that are read in blocks have a dictionary a block; Arrow compares or merges them all again and again.
    """
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_dictionary(column.type) and column.num_chunks > 1:
            chunks = column.unify_dictionaries().chunks
            codes = pa.concat_arrays([chunk.indices for chunk in chunks])
            column = pa.DictionaryArray.from_arrays(codes, chunks[0].dictionary)
        columns[name] = column
    return pa.table(columns)


def require_ids(table: pa.Table, path: Path, *names: str) -> None:
    """Raise a UserError that names the first row where one of these (string or dictionary) columns is empty."""
    for name in names:
        before = 0
        for chunk in table[name].chunks:
            if pa.types.is_dictionary(chunk.type):
                code = pc.index(chunk.dictionary, "")
                row = pc.index(chunk.indices, code.cast(chunk.indices.type)).as_py() if code.as_py() >= 0 else -1
            else:
                row = pc.index(chunk, "").as_py()
            if row >= 0:
                raise UserError(f"{path}, data row {before + row + 1}: {name} is empty")
            before += len(chunk)


def cast_strings(strings: pa.ChunkedArray, kind: pa.DataType, path: Path, column: str, what: str) -> pa.ChunkedArray:
    """A string column as another type.

    Raises:
        UserError: naming the first row that is not ``what``.
    """
    trimmed = pc.utf8_trim_whitespace(strings)
    try:
        return pc.cast(trimmed, kind)
    except pa.ArrowInvalid:
        row = _first_failure(trimmed, kind)
        raise UserError(f"{path}, data row {row + 1}: {column} is {trimmed[row].as_py()[:80]!r}, not {what}") from None


def require_unique_items(raw: RawData) -> None:
    """Raise a UserError that names the first row of the item file that describes an item again."""
    ids = raw.items["item_id"]
    if len(pc.unique(ids)) == len(ids):
        return
    seen = set()
    for row, item in enumerate(ids.to_pylist(), start=1):
        if item in seen:
            raise UserError(f"{raw.files[-1]}, data row {row}: item_id {item[:80]!r} occurs twice; keep one row")
        seen.add(item)


def add_times(interactions: pa.Table, times: pa.ChunkedArray, per_second: int) -> pa.Table:
    """With ``timestamp`` of int64 ``times`` in parts of a second, cut to seconds, and ``subsecond`` if that cuts any.

    What is cut off still orders a user's interactions.
    """
    seconds = pc.divide(times, per_second)
    interactions = interactions.append_column("timestamp", seconds)
    rest = pc.subtract(times, pc.multiply(seconds, per_second))
    return interactions.append_column("subsecond", rest) if pc.any(pc.not_equal(rest, 0)).as_py() else interactions


def read_times(interactions: pa.Table, table: pa.Table, column: str, path: Path) -> pa.Table:
    """``interactions`` with the times in a string column of ``table``, as ``add_times`` adds them.

    Never float32: it cannot tell times a minute apart.

    The first row decides how all are read: numbers are taken as they are (whatever they count), dates like
    2010-12-01, 2010-12-01 08:26:00 or 2010-12-01T08:26:00Z become seconds since 1970.

    Raises:
        UserError: naming the first row that is no number (or no date), or no time.
    """
    strings = table[column]
    try:
        return add_times(interactions, pc.cast(pc.utf8_trim_whitespace(strings), pa.int64()), 1)
    except pa.ArrowInvalid:
        pass
    first = strings[0].as_py().strip()
    if first[4:5] == first[7:8] == "-":
        zone = "UTC" if re.search(r"(Z|[+-]\d\d:?(\d\d)?)$", first[10:]) else None
        times = cast_strings(strings, pa.timestamp("us", zone), path, column, "a date like 2010-12-01 08:26:00")
        return add_times(interactions, pc.cast(times, pa.int64()), 10**6)
    seconds = cast_strings(strings, pa.float64(), path, column, "a number (or all dates like 2010-12-01)").to_numpy()
    bad = ~(np.abs(seconds) < 2**63)  # NaN compares false
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UserError(f"{path}, data row {row + 1}: {column} is {strings[row].as_py()[:80]!r}, not a time")
    whole = seconds.astype(np.int64)
    rest = ((seconds - whole) * 10**9).astype(np.int64)
    columns = {"timestamp": whole, **({"subsecond": rest} if rest.any() else {})}
    for name, values in columns.items():
        interactions = interactions.append_column(name, pa.chunked_array([values]))
    return interactions


def keep_rated(
    table: pa.Table, ratings: pa.ChunkedArray, min_rating: float | None, dropped: dict[str, int]
) -> pa.Table:
    """The rows rated at least ``min_rating`` (all if None); adds how many were left out to ``dropped``.

    Args:
        table: the interactions.
        ratings: float64, one a row.
        min_rating: RecBole-family papers use 3.
        dropped: gets ``rating_too_low``.
    """
    if min_rating is None:
        return table
    kept = table.filter(pc.greater_equal(ratings, min_rating))
    dropped["rating_too_low"] = len(table) - len(kept)
    return kept


def _first_failure(strings: pa.ChunkedArray, kind: pa.DataType) -> int:
    """The first row that cannot be cast, by halves: a loop over ten million rows would take minutes."""
    begin, end = 0, len(strings)
    while end - begin > 1:
        middle = (begin + end) // 2
        try:
            pc.cast(strings.slice(begin, middle - begin), kind)
            begin = middle
        except pa.ArrowInvalid:
            end = middle
    return begin
