"""Text files of any size, plain or gzip, read in blocks: bytes, whole lines, and the one careful way to read csv."""

import codecs
import csv as standard_csv
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
from pyarrow import csv

from rec.data.raw import first_line, in_one_piece, require_columns
from rec.runtime.errors import UserError

BLOCK = 1 << 20
ENCODED = pa.dictionary(pa.int32(), pa.string())


def blocks(path: Path, encoding: str = "utf-8") -> Iterator[bytes]:
    """A file's text as UTF-8 in blocks of about 1 MiB, decompressed if its name ends in ``.gz``.

    Raises:
        UserError: if the file is missing, unreadable, empty or only white space, a truncated or broken gzip, or is
            not ``encoding`` text (names the line).
    """
    decoder, lines, empty = codecs.getincrementaldecoder(encoding)(), 0, True
    for nth, block in enumerate(_raw_blocks(path)):
        try:
            text = decoder.decode(block, not block)
        except UnicodeDecodeError as error:
            line = lines + error.object[: error.start].count(b"\n") + 1
            byte = error.object[error.start]
            raise UserError(
                f"{path}, line {line}: not {encoding} text (byte {byte:#04x}); save it as {encoding}"
            ) from None
        lines += block.count(b"\n")
        if not nth and encoding == "utf-8":
            block = block.removeprefix(codecs.BOM_UTF8)
        empty = empty and not block.strip()
        yield block if encoding == "utf-8" else text.encode()
    if empty:
        raise UserError(f"{path} is empty")


def lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, bytes]]:
    """Blocks of whole lines, each with the number of its first line (from 1); errors as ``blocks``."""
    number, pending = 1, []
    for block in blocks(path, encoding):
        head, newline, tail = block.rpartition(b"\n")
        if newline:
            whole = b"".join([*pending, head, newline])
            yield number, whole
            number, pending = number + whole.count(b"\n"), [tail]
        else:
            pending.append(block)
    rest = b"".join(pending)
    if rest:
        yield number, rest


def header(path: Path, delimiter: str, encoding: str = "utf-8", quoted: bool = True) -> list[str]:
    """The column names in a file's first line.

    Raises:
        UserError: if a name is empty or occurs twice, no row follows, or the file cannot be read.
    """
    first, rest, more = b"", b"", blocks(path, encoding)
    for block in more:
        first += block
        if b"\n" in first or len(first) > BLOCK:
            break
    first, _, rest = first.partition(b"\n")
    if not rest.strip() and not any(block.strip() for block in more):
        raise UserError(f"{path} has a header line but no rows")
    text = first.decode(errors="replace").rstrip("\r")
    try:
        names = next(standard_csv.reader([text], delimiter=delimiter)) if quoted else text.split(delimiter)
    except (standard_csv.Error, StopIteration):
        names = []
    if not names or len(set(names)) < len(names) or not all(names):
        raise UserError(f"{path}: the header line has empty or repeated column names: {text[:200]!r}")
    return names


def read_delimited(
    path: Path,
    delimiter: str = ",",
    columns: list[str] | None = None,
    encoding: str = "utf-8",
    quoted: bool = True,
    wanted: Sequence[str] | None = None,
    ids: Sequence[str] = (),
) -> pa.Table:
    """Read delimited text, every column as a string. Only the result is ever in memory, not the file.

    Args:
        path: plain or ``.gz``.
        delimiter: one character, or the ``::`` of MovieLens.
        columns: names for a file without a header line.
        encoding: of the file.
        quoted: whether double quotes enclose fields.
        wanted: the columns to keep; all by default.
        ids: the columns to keep as dictionaries: few distinct values in many rows.

    Raises:
        UserError: naming the file and, for a row with a wrong number of fields, its number (the header is row 1);
            also if there is no row below the header, the file ends inside double quotes, or lacks a column.
    """
    names = columns or header(path, delimiter, encoding, quoted)
    require_columns(names, path, *(wanted or ()))
    source = _Source(path, delimiter, encoding)
    kept = list(wanted or names)
    # The last field tells whether the file ends inside quotes.
    included = list(dict.fromkeys([*kept, names[-1]])) if quoted else kept
    batches, last = [], ""
    try:
        for batch in csv.open_csv(
            io.BufferedReader(source, BLOCK),
            # One thread, because only then does the error of a broken row know its number.
            csv.ReadOptions(use_threads=False, column_names=names, skip_rows=0 if columns else 1),
            csv.ParseOptions(
                delimiter="\t" if len(delimiter) > 1 else delimiter,
                quote_char='"' if quoted else False,
                newlines_in_values=quoted,
                ignore_empty_lines=len(names) > 1,  # an empty line is one column's empty field
            ),
            csv.ConvertOptions(
                column_types={name: ENCODED if name in ids else pa.string() for name in names},
                include_columns=included,
                strings_can_be_null=False,
                check_utf8=False,
            ),
        ):
            if len(batch):
                last = batch[names[-1]][-1].as_py() if quoted else ""
                batches.append(batch.select(kept))
    except pa.ArrowException as error:
        if "straddling" in str(error):
            raise UserError(f"{path}: a row is longer than 1 MiB; is a double quote left open?") from None
        raise UserError(f"{path}: {first_line(error)}") from None
    if not batches:
        raise UserError(f"{path} has no rows")
    table = in_one_piece(pa.Table.from_batches(batches))
    if quoted and source.ends_in_quotes(last):
        raise UserError(f"{path}, data row {len(table)}: a double quote is left open")
    return table


class _Source(io.RawIOBase):
    """A text file as Arrow reads it: UTF-8 with a delimiter of one character."""

    def __init__(self, path: Path, delimiter: str, encoding: str) -> None:
        self._blocks = blocks(path, encoding)
        if len(delimiter) > 1:
            self._blocks = _replaced(self._blocks, delimiter.encode())
        self._rest, self._tail, self._quotes = memoryview(b""), b"", 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
            self._quotes += block.count(b'"')
            self._tail = self._tail[-BLOCK:] + block  # the last row fits: Arrow takes none that is longer than this
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size

    def ends_in_quotes(self, last: str) -> bool:
        """Whether a quote opens the last field and nothing closes it: Arrow takes the rest of the file for it."""
        return self._quotes % 2 == 1 and self._tail.endswith(b'"' + last.replace('"', '""').encode())


def _raw_blocks(path: Path) -> Iterator[bytes]:
    """Decompressed blocks, then an empty one for the end."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            block = stream.read(BLOCK)
            if block.startswith(b"\x1f\x8b"):
                raise UserError(f"{path} is compressed: add .gz to its name")
            while block:
                yield block
                block = stream.read(BLOCK)
    except FileNotFoundError:
        raise UserError(f"raw data not found: {path}") from None
    except (EOFError, OSError, zlib.error) as error:  # BadGzipFile is an OSError
        hint = "; it is cut off or damaged: get it anew" if isinstance(error, EOFError | zlib.error) else ""
        raise UserError(f"{path} cannot be read: {error}{hint}") from error
    yield b""


def _replaced(source: Iterator[bytes], delimiter: bytes) -> Iterator[bytes]:
    pending = b""
    for block in source:
        block = pending + block
        whole = block.rstrip(delimiter[:1]) if block else block
        pending = block[len(whole) :]
        yield whole.replace(delimiter, b"\t")
    yield pending.replace(delimiter, b"\t")
