"""An Excel sheet as a table of texts."""

import contextlib
import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from rec.runtime.errors import UserError


def read(path: Path) -> pa.Table:
    """The first sheet of an ``.xlsx`` file: names in the first row, every column as text, dates as ISO dates.

    Raises:
        UserError: if openpyxl is not installed, or the file is none, is damaged, or has no rows.
    """
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            f"reading {path} needs openpyxl: 'pip install openpyxl', or save the sheet as csv with dates like"
            " 2010-12-01 08:26:00"
        ) from None
    try:
        with contextlib.closing(openpyxl.load_workbook(path, read_only=True, data_only=True)) as book:
            rows = book.worksheets[0].iter_rows(values_only=True)
            names = [_text(cell) for cell in next(rows, ())]
            columns: list[list[str]] = [[] for _ in names]
            for row in rows:
                if any(cell is not None for cell in row):
                    for place, column in enumerate(columns):
                        column.append(_text(row[place]) if place < len(row) else "")
    # openpyxl raises whatever its XML parser, zlib and its own code come across: no list of types is complete.
    except Exception as error:
        raise UserError(f"{path} is not a readable .xlsx file: {' '.join(str(error).split())[:200]}") from None
    if not names or len(set(names)) < len(names) or not all(names):
        raise UserError(f"{path}: the first row has empty or repeated column names: {', '.join(names)[:200]!r}")
    if not columns[0]:
        raise UserError(f"{path} has a header line but no rows")
    return pa.table({name: pa.array(column, pa.string()) for name, column in zip(names, columns, strict=True)})


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, datetime.datetime):
        return cell.isoformat(" ", "seconds")
    return str(cell)
