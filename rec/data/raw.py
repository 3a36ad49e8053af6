"""What every reader returns, and the one careful way to read delimited text."""

import gzip
import io
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from rec.runtime.errors import UserError


@dataclass(frozen=True)
class RawData:
    """One source, as read.

    Attributes:
        items: ``item_id`` (string, unique) and text columns (string, "" where missing).
        interactions: ``user_id`` (string), ``item_id`` (string), ``timestamp`` (int64 seconds), in source order:
            it breaks ties of time.
        files: what was read.
        dropped: rows that the reader left out, counted by reason.
    """

    items: pa.Table
    interactions: pa.Table
    files: list[Path]
    dropped: dict[str, int] = field(default_factory=dict)


def find_file(folder: Path, *names: str) -> Path:
    """The first of ``names`` (also with ``.gz``) in ``folder``; ``folder`` may be one of these files itself.

    Raises:
        UserError: if none is there.
    """
    if folder.is_file():
        return folder
    if not folder.exists():
        raise UserError(f"raw data not found: {folder}")
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise UserError(f"{folder} holds none of: {', '.join(names)} (also tried .gz)")


def read_content(path: Path) -> bytes:
    """A file's bytes, decompressed if its name ends in ``.gz``.

    Raises:
        UserError: if the file is missing, unreadable, empty, or a truncated or broken gzip.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"raw data not found: {path}") from None
    except (EOFError, OSError) as error:  # BadGzipFile is an OSError
        raise UserError(f"{path} cannot be read: {error}") from error
    if not content.strip():
        raise UserError(f"{path} is empty")
    return content


def read_delimited(
    path: Path,
    delimiter: str = ",",
    columns: list[str] | None = None,
    encoding: str = "utf-8",
    quoted: bool = True,
) -> pa.Table:
    """Read delimited text, every column as a string.

    Args:
        path: plain or ``.gz``.
        delimiter: one character, or the ``::`` of MovieLens.
        columns: names for a file without a header line.
        encoding: of the file.
        quoted: whether double quotes enclose fields.

    Raises:
        UserError: naming the file and, for a row with a wrong number of fields, its line.
    """
    content = read_content(path)
    if len(delimiter) > 1:
        content, delimiter = content.replace(delimiter.encode(), b"\t"), "\t"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not {encoding} text (byte {content[error.start]:#04x})") from None
    names = columns or _header(path, text, delimiter, quoted)
    try:
        return csv.read_csv(
            io.BytesIO(text.encode()),
            # One thread, because only then does the error of a broken row know its number.
            csv.ReadOptions(use_threads=False, column_names=names, skip_rows=0 if columns else 1),
            csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted),
            csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from None


def require_columns(table: pa.Table, path: Path, *names: str) -> None:
    """Raise a UserError that lists what is there if one of ``names`` is not."""
    for name in names:
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name!r}; it has: {', '.join(table.column_names)}")


def to_numbers(table: pa.Table, column: str, path: Path) -> np.ndarray:
    """A string column as float64.

    Raises:
        UserError: naming the first row that is not a number.
    """
    strings = table[column]
    try:
        return pc.cast(pc.utf8_trim_whitespace(strings), pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        for row, text in enumerate(strings.to_pylist(), start=1):
            try:
                float(text)
            except ValueError:
                raise UserError(f"{path}, data row {row}: {column} is {text!r}, not a number") from None
        raise


def to_seconds(table: pa.Table, column: str, path: Path) -> pa.Array:
    """A column of seconds since 1970 as int64. Never float32: it cannot tell times a minute apart."""
    seconds = to_numbers(table, column, path)
    if not np.isfinite(seconds).all():
        row = int(np.flatnonzero(~np.isfinite(seconds))[0]) + 1
        raise UserError(f"{path}, data row {row}: {column} is not a time")
    return pa.array(seconds.astype(np.int64))


def _header(path: Path, text: str, delimiter: str, quoted: bool) -> list[str]:
    first = text.split("\n", 1)[0].rstrip("\r").lstrip("\ufeff")
    names = [name.strip('"') if quoted else name for name in first.split(delimiter)]
    if len(set(names)) < len(names) or not all(names):
        raise UserError(f"{path}: the header line has empty or repeated column names: {first[:200]}")
    return names
