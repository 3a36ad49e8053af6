"""A plain pair of tables: ``interactions`` and ``items``, csv or parquet."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from rec.data import raw, textfile
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)

NAMES = ("csv", "parquet")
COLUMNS = ("user_id", "item_id", "timestamp")
ROWS = 1 << 17
PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def read(folder: Path) -> raw.RawData:
    """Read ``interactions.{csv,parquet}`` (user_id, item_id, timestamp) and ``items.{csv,parquet}`` (item_id, text …).

    ``timestamp`` is a number (seconds since 1970 where the time of day matters; positions will do), a date like
    2010-12-01 08:26:00 or, in parquet, any date or timestamp type. Equal times (days, say) keep the order of rows.
    Ids of any type become strings; further columns of ``items`` are text fields. Without an ``items`` file, items
    have no text.
    """
    path = raw.find_file(folder, *(f"interactions.{name}" for name in NAMES))
    if ".csv" in path.suffixes:
        interactions = textfile.read_delimited(path, wanted=COLUMNS, ids=COLUMNS[:2])
    else:
        interactions = _read_parquet(path, COLUMNS, ids=COLUMNS[:2])
    raw.require_ids(interactions, path, "user_id", "item_id")
    interactions = _with_times(interactions, path)
    items_path = raw.find_optional(path.parent, *(f"items.{name}" for name in NAMES))
    if items_path is None:
        log.warning("%s holds no items.csv or items.parquet: the items have no text", path.parent)
        return raw.RawData(raw.items_without_text(), interactions, [path])
    return raw.RawData(read_items(items_path), interactions, [path, items_path])


def read_items(path: Path) -> pa.Table:
    """An item table, every column as text.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    items = textfile.read_delimited(path) if ".csv" in path.suffixes else _read_parquet(path)
    raw.require_columns(items.column_names, path, "item_id")
    raw.require_ids(items, path, "item_id")
    return items


def _read_parquet(path: Path, wanted: Sequence[str] | None = None, ids: Sequence[str] = ()) -> pa.Table:
    try:
        with parquet.ParquetFile(path) as source:
            names = source.schema_arrow.names
            raw.require_columns(names, path, *(wanted or ()))
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"{path} has the column {name!r} twice")
            batches = source.iter_batches(ROWS, columns=list(wanted or names))
            tables = [_as_text(batch, path, ids) for batch in batches if len(batch)]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a readable parquet file: {raw.first_line(error)}") from None
    if not tables:
        raise UserError(f"{path} has no rows")
    return raw.in_one_piece(pa.concat_tables(tables))


def _as_text(batch: pa.RecordBatch, path: Path, ids: Sequence[str]) -> pa.Table:
    """Ids as dictionaries of texts, with ids also the time as it is, everything else as text."""
    columns = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            if name in ids:
                columns[name] = _encoded(column)
            elif ids and name == "timestamp":
                columns[name] = column
            else:
                columns[name] = pc.fill_null(pc.cast(column, pa.string()), "")
        except pa.ArrowException:
            raise UserError(f"{path}: column {name!r} ({column.type}) cannot be read as text") from None
    return pa.table(columns)


def _encoded(column: pa.Array) -> pa.DictionaryArray:
    encoded = pc.dictionary_encode(column)
    codes, values = encoded.indices.cast(pa.int32()), pc.fill_null(pc.cast(encoded.dictionary, pa.string()), "")
    if codes.null_count:
        values = pa.concat_arrays([values, pa.array([""])])
        codes = pc.fill_null(codes, len(values) - 1)
    return pa.DictionaryArray.from_arrays(codes, values)


def _with_times(interactions: pa.Table, path: Path) -> pa.Table:
    """Times as every reader has them, in place of the column as it was read."""
    times, interactions = interactions["timestamp"], interactions.drop_columns(["timestamp"])
    per_second = 1
    if pa.types.is_date(times.type):
        times = pc.cast(pc.cast(times, pa.timestamp("s"), safe=False), pa.int64())
    elif pa.types.is_timestamp(times.type):
        times, per_second = pc.cast(times, pa.int64()), PER_SECOND[times.type.unit]
    try:
        if pa.types.is_integer(times.type) and not times.null_count:
            return raw.add_times(interactions, pc.cast(times, pa.int64()), per_second)
        # One place decides what is a time, and it reads text.
        strings = pc.fill_null(pc.cast(times, pa.string()), "")
    except pa.ArrowException:
        raise UserError(f"{path}: column 'timestamp' ({times.type}) cannot be read as a time") from None
    return raw.read_times(interactions, pa.table({"timestamp": strings}), "timestamp", path)
