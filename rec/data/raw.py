"""What every reader returns, and the one careful way to read delimited text."""

import csv as standard_csv
import gzip
import io
import zlib
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
        options: the reader's options that differ from their defaults.
    """

    items: pa.Table
    interactions: pa.Table
    files: list[Path]
    dropped: dict[str, int] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)


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
    except (EOFError, OSError, zlib.error) as error:  # BadGzipFile is an OSError
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
        UserError: naming the file and, for a row with a wrong number of fields, its number (the header is row 1);
            also if there is no row below the header, or the file ends inside double quotes.
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
    if not columns and not text.partition("\n")[2].strip():
        raise UserError(f"{path} has a header line but no rows")
    try:
        table = csv.read_csv(
            io.BytesIO(text.encode()),
            # One thread, because only then does the error of a broken row know its number.
            csv.ReadOptions(use_threads=False, column_names=names, skip_rows=0 if columns else 1),
            csv.ParseOptions(delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted),
            csv.ConvertOptions(column_types={name: pa.string() for name in names}, strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        if "straddling" in str(error):
            raise UserError(f"{path}: a row is longer than 1 MiB; is a double quote left open?") from None
        raise UserError(f"{path}: {first_line(error)}") from None
    if quoted and _ends_in_quotes(text, table[-1][-1].as_py()):
        raise UserError(f"{path}, data row {len(table)}: a double quote is left open")
    return table


def first_line(error: Exception) -> str:
    """What an Arrow error says, without its further lines."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def require_columns(table: pa.Table, path: Path, *names: str) -> None:
    """Raise a UserError that lists what is there if one of ``names`` is not."""
    for name in names:
        if name not in table.column_names:
            raise UserError(f"{path} has no column {name!r}; it has: {', '.join(table.column_names)}")


def require_ids(table: pa.Table, path: Path, *names: str) -> None:
    """Raise a UserError that names the first row where one of these string columns is empty."""
    for name in names:
        row = pc.index(table[name], "").as_py()
        if row >= 0:
            raise UserError(f"{path}, data row {row + 1}: {name} is empty")


def cast_strings(strings: pa.ChunkedArray, kind: pa.DataType, path: Path, column: str, what: str) -> pa.ChunkedArray:
    """A string column as another type.

    Raises:
        UserError: naming the first row that is not ``what``.
    """
    trimmed = pc.utf8_trim_whitespace(strings)
    try:
        return pc.cast(trimmed, kind)
    except pa.ArrowInvalid:
        for row, text in enumerate(trimmed, start=1):
            try:
                pc.cast(text, kind)
            except pa.ArrowInvalid:
                value = text.as_py()[:80]
                raise UserError(f"{path}, data row {row}: {column} is {value!r}, not {what}") from None
        raise


def to_seconds(table: pa.Table, column: str, path: Path) -> pa.ChunkedArray:
    """A string column of seconds since 1970 as int64. Never float32: it cannot tell times a minute apart.

    Raises:
        UserError: naming the first row that is no number, or no time.
    """
    strings = table[column]
    try:
        return pc.cast(pc.utf8_trim_whitespace(strings), pa.int64())
    except pa.ArrowInvalid:
        seconds = cast_strings(strings, pa.float64(), path, column, "a number").to_numpy()
    bad = ~(np.abs(seconds) < 2**63)  # NaN compares false
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise UserError(f"{path}, data row {row + 1}: {column} is {strings[row].as_py()!r}, not a time")
    return pa.chunked_array([seconds.astype(np.int64)])


def _header(path: Path, text: str, delimiter: str, quoted: bool) -> list[str]:
    first = text.split("\n", 1)[0].rstrip("\r").lstrip("\ufeff")
    names = next(standard_csv.reader([first], delimiter=delimiter)) if quoted else first.split(delimiter)
    if not names or len(set(names)) < len(names) or not all(names):
        raise UserError(f"{path}: the header line has empty or repeated column names: {first[:200]}")
    return names


def _ends_in_quotes(text: str, last: str) -> bool:
    """Whether a quote opens the last field and nothing closes it: Arrow then takes the rest of the file for it."""
    return text.count('"') % 2 == 1 and text.endswith('"' + last.replace('"', '""'))
