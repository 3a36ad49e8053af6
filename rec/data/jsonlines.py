"""JSON lines of any size, plain or gzip: chosen fields as columns, or one mapping a line."""

import ast
import io
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import json as arrow_json

from rec.data.raw import in_one_piece, require_ids
from rec.data.textfile import ENCODED, lines
from rec.runtime.errors import UserError

SHOWN = 80


def read_fields(path: Path, fields: dict[str, pa.DataType]) -> pa.Table:
    """Some fields of every line.

    Args:
        path: one JSON object a line, plain or ``.gz``; blank lines are skipped.
        fields: names with ``string`` (an id: a number is taken as its digits, and the result is a dictionary),
            ``int64`` (a time: fractions are cut off) or ``float64``.

    Raises:
        UserError: naming the first line that is no JSON object, or lacks a field, or has it with another type.
    """
    schema, tables = pa.schema(fields.items()), []
    for number, block in lines(path):
        table = _by_arrow(block, schema)
        tables.append(_encoded(_by_python(path, number, block, schema) if table is None else table))
    table = in_one_piece(pa.concat_tables(tables))
    require_ids(table, path, *(name for name, kind in fields.items() if kind == pa.string()))
    return table


def read_objects(path: Path, python_literals: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and mappings.

    Args:
        path: one JSON object a line, plain or ``.gz``; blank lines are skipped.
        python_literals: whether a line may also be a Python dict display (Amazon's metadata of 2014).

    Raises:
        UserError: naming the first line that is neither.
    """
    for number, block in lines(path):
        for nth, line in enumerate(block.split(b"\n")):
            if line.strip():
                yield number + nth, _parse(path, number + nth, line.decode(), python_literals)


def clean(text: str) -> str:
    """Text without lone surrogates, which JSON can spell but no file can hold."""
    return text.encode("utf-8", "replace").decode()


def _by_arrow(block: bytes, schema: pa.Schema) -> pa.Table | None:
    """Fast; None for anything unusual."""
    try:
        table = arrow_json.read_json(
            io.BytesIO(block),
            arrow_json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (pa.ArrowException, UnicodeDecodeError):
        return None
    if len(table) != sum(bool(line.strip()) for line in block.split(b"\n")) or table.schema != schema:
        return None
    return None if any(column.null_count for column in table.columns) else table


def _by_python(path: Path, number: int, block: bytes, schema: pa.Schema) -> pa.Table:
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for nth, line in enumerate(block.split(b"\n")):
        if line.strip():
            found = _parse(path, number + nth, line.decode(), python_literals=False)
            for name, kind in zip(schema.names, schema.types, strict=True):
                columns[name].append(_convert(found.get(name), kind, f"{path}, line {number + nth}: {name}"))
    return pa.table(columns, schema=schema)


def _encoded(table: pa.Table) -> pa.Table:
    columns = {
        name: table[name].cast(ENCODED) if table[name].type == pa.string() else table[name]
        for name in table.column_names
    }
    return pa.table(columns)


def _parse(path: Path, number: int, line: str, python_literals: bool) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        reason = f"{error.msg} at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
        found = _literal(line) if python_literals else None
        if found is None:
            kind = "JSON object or Python dict" if python_literals else "JSON object"
            raise UserError(f"{path}, line {number}: not a {kind} ({reason})") from None
    except RecursionError:
        raise UserError(f"{path}, line {number}: brackets are nested too deeply") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}, line {number}: not a JSON object but {str(found)[:SHOWN]!r}")
    return found


def _literal(line: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a title is an invalid escape to Python
            return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _convert(value: Any, kind: pa.DataType, where: str) -> Any:
    if value is None:
        raise UserError(f"{where} is missing")
    shown = clean(str(value))[:SHOWN]
    if kind == pa.string():
        if isinstance(value, str):
            return clean(value)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        raise UserError(f"{where} is {shown!r}, not an id")
    what = "a time" if kind == pa.int64() else "a number"
    try:
        if isinstance(value, bool):
            raise ValueError
        number = value if isinstance(value, int) else float(value)
        if kind == pa.int64():
            number = int(number)
            if abs(number) >= 2**63:
                raise ValueError
        elif math.isnan(number):
            raise ValueError
        return number
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{where} is {shown!r}, not {what}") from None
