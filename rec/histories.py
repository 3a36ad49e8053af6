"""Files of histories to answer, and the files of answers.

A row has ``history``, a list of item ids or text with commas between them, or ``user_id`` alone, a user of the data
whose known history is meant. With both, ``user_id`` is a label that is handed through.
"""

import contextlib
import csv
import difflib
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rec.catalog import Catalog, require_history, split_ids
from rec.data.jsonlines import clean, read_objects
from rec.data.prepared import Prepared
from rec.data.textfile import read_delimited
from rec.job import FinishedRun
from rec.recommend import Recommendation, Request, recommend, request_for_user, require_readable
from rec.runtime import files
from rec.runtime.errors import UserError
from rec.runtime.progress import progress

READABLE, WRITABLE = (".csv", ".jsonl", ".parquet"), (".csv", ".jsonl")
HISTORY, USER = "history", "user_id"


@dataclass(frozen=True)
class Row:
    """One row: where it stands, its ``user_id`` if it has one, and what to answer."""

    number: int
    label: str | None
    request: Request


@dataclass(frozen=True)
class Batch:
    """Counts of a whole file.

    Histories answered, unknown ids left out, rows with none left, rows with short lists, and histories that are longer
    than the model reads: their first items do not count.
    """

    answered: int
    unknown: int
    empty: int
    short: int
    cut: int


def user_number(data: Prepared, user: str) -> int:
    """The number of a raw user id; raises UserError, with the nearest ones, if there is none."""
    known = data.user_ids
    try:
        return known.index(user)
    except ValueError:
        near = difflib.get_close_matches(user, known, 3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"ids look like {known[0]!r}"
        raise UserError(f"unknown user {user[:60]!r}; {hint}") from None


def check_names(source: Path, out: Path) -> None:
    """Raise a UserError if ``source`` cannot be read or ``out`` not be written, by their names."""
    if _kind(source) not in READABLE:
        raise UserError(f"{source}: histories come as {', '.join(READABLE)} (also .csv.gz and .jsonl.gz)")
    if not source.is_file():
        raise UserError(f"histories not found: {source}")
    if out.suffix not in WRITABLE:
        raise UserError(f"{out}: recommendations are written as {' or '.join(WRITABLE)}")
    files.require_writable(out)
    if out.exists() and out.samefile(source):
        raise UserError(f"{out} is the file of histories itself; name another file to write")


def answer_file(
    run: FinishedRun, catalog: Catalog, source: Path, out: Path, k: int, include_seen: bool, skip_unknown: bool
) -> Batch:
    """Recommend for every row of ``source`` and write ``out``, which appears when it is whole.

    Args:
        run: the trained recommender.
        catalog: of its data.
        source: csv, jsonl or parquet.
        out: csv (a line a recommendation) or jsonl (a line a history).
        k: recommendations a history.
        include_seen: whether items of the history may be recommended.
        skip_unknown: leave unknown item ids out instead of raising.

    Raises:
        UserError: naming file and row of a mistake, or if ``out`` cannot be written.
    """
    check_names(source, out)
    rows, unknown, empty = _resolve(run, catalog, source, skip_unknown)
    short, size = 0, run.rec.evaluate.batch_size
    temporary = files.beside(out)
    try:
        with temporary.open("w", encoding="utf-8", newline="") as stream, progress(source.name, len(rows)) as advance:
            writer = _Writer(stream, out.suffix == ".csv", any(row.label is not None for row in rows), catalog)
            for begin in range(0, len(rows), size):
                chunk = rows[begin : begin + size]
                lists = recommend(run, catalog, [row.request for row in chunk], k, include_seen)
                writer.write(chunk, lists)
                short += sum(len(found) < k for found in lists)
                advance(begin + len(chunk))
        files.fsync(temporary)
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    longest = math.inf if run.model.samples == "pairs" else run.model.reach
    cut = sum(len(row.request.history) > longest for row in rows)
    return Batch(len(rows), unknown, empty, short, cut)


def _resolve(run: FinishedRun, catalog: Catalog, source: Path, skip_unknown: bool) -> tuple[list[Row], int, int]:
    rows, unknown, empty = [], 0, 0
    users = {user: number for number, user in enumerate(run.data.user_ids)}
    for number, where, content in _read(source):
        label = content.get(USER)
        label = None if label in (None, "") else clean(str(label))
        # An empty field of a csv is one that is not there.
        absent = content.get(HISTORY) is None or (label is not None and _is_blank(content[HISTORY]))
        known = users.get(label)
        try:
            if absent and known is None and skip_unknown and HISTORY in content:  # of somebody without history
                empty += 1
                continue
            if absent and label is None:
                raise UserError(f"neither {HISTORY!r} nor {USER!r}")
            if absent:
                request = request_for_user(run.data, user_number(run.data, label) if known is None else known)
            elif skip_unknown and _is_blank(content[HISTORY]):
                empty += 1
                continue
            else:
                ids = _ids(content[HISTORY])
                left = [item for item in ids if catalog.find(item) is not None] if skip_unknown else ids
                unknown += len(ids) - len(left)
                if not left:
                    empty += 1
                    continue
                request = Request(catalog.numbers(left))
            require_readable(run.model, request)
        except UserError as error:
            raise UserError(f"{source}, {where}: {error}") from None
        rows.append(Row(number, label, request))
    return rows, unknown, empty


def _is_blank(history: Any) -> bool:
    return not (history.strip(' ,"\t') if isinstance(history, str) else history)


def _ids(value: Any) -> list[str]:
    if isinstance(value, str):
        return split_ids(value)
    if not isinstance(value, list):
        raise UserError(f"{HISTORY} is {str(value)[:60]!r}, neither a list of ids nor text")
    bad = [item for item in value if isinstance(item, bool) or not isinstance(item, str | int)]
    if bad:
        raise UserError(f"{str(bad[0])[:60]!r} in {HISTORY} is no id")
    return require_history([str(item) for item in value])


def _read(source: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Number, place and content of every row."""
    kind = _kind(source)
    if kind == ".jsonl":
        # Numbered by line, so that a line of the answers says which line it answers.
        for line, content in read_objects(source):
            yield line, f"line {line}", content
        return
    table = read_delimited(source) if kind == ".csv" else _parquet(source)
    if HISTORY not in table.column_names and USER not in table.column_names:
        found = ", ".join(table.column_names)
        raise UserError(f"{source} has neither a column {HISTORY!r} nor {USER!r}; it has: {found}")
    table = table.select([name for name in (HISTORY, USER) if name in table.column_names])
    for number, content in enumerate(table.to_pylist(), start=1):
        yield number, f"data row {number}", content


def _parquet(source: Path) -> pa.Table:
    try:
        return parquet.read_table(source)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{source} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _kind(source: Path) -> str:
    return Path(source.name.removesuffix(".gz")).suffix


class _Writer:
    """Appends answers to an open file."""

    def __init__(self, stream: io.TextIOBase, as_csv: bool, labelled: bool, catalog: Catalog) -> None:
        self.stream, self.labelled, self.titled = stream, labelled, catalog.has_text
        self.csv = csv.writer(stream, lineterminator="\n") if as_csv else None
        if self.csv:
            title = ["title"] if self.titled else []
            self.csv.writerow(["row", *([USER] if labelled else []), "rank", "item_id", *title, "score"])

    def write(self, rows: Sequence[Row], lists: Sequence[list[Recommendation]]) -> None:
        """Append the answers to ``rows``."""
        for row, found in zip(rows, lists, strict=True):
            if self.csv:
                label = [row.label or ""] if self.labelled else []
                self.csv.writerows([row.number, *label, *self._entry(item).values()] for item in found)
                continue
            label = {USER: row.label} if self.labelled else {}
            content = {"row": row.number, **label, "items": [self._entry(item) for item in found]}
            self.stream.write(json.dumps(content, ensure_ascii=False) + "\n")

    def _entry(self, item: Recommendation) -> dict[str, Any]:
        return entry(item, self.titled)


def entry(item: Recommendation, titled: bool) -> dict[str, Any]:
    """One recommendation as it is written everywhere; ``titled`` where items have text."""
    title = {"title": item.title} if titled else {}
    return {"rank": item.rank, "item_id": item.item_id, **title, "score": round(item.score, 6)}
