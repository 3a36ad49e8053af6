"""A plain pair of tables: ``interactions`` and ``items``, csv or parquet."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from rec.data import raw
from rec.runtime.errors import UserError

NAMES = ("csv", "parquet")


def read(folder: Path) -> raw.RawData:
    """Read ``interactions.{csv,parquet}`` (user_id, item_id, timestamp) and ``items.{csv,parquet}`` (item_id, text …).

    ``timestamp`` is seconds since 1970 or, in parquet, any timestamp type; ids of any type become strings;
    further columns of ``items`` are text fields.
    """
    interactions_path = raw.find_file(folder, *(f"interactions.{name}" for name in NAMES))
    items_path = raw.find_file(interactions_path.parent, *(f"items.{name}" for name in NAMES))
    interactions, items = _read(interactions_path), _read(items_path)
    raw.require_columns(interactions, interactions_path, "user_id", "item_id", "timestamp")
    raw.require_columns(items, items_path, "item_id")
    times = interactions["timestamp"]
    if pa.types.is_timestamp(times.type) or pa.types.is_date(times.type):
        # Through whole seconds and back to text: one place decides what is a time.
        times = pc.cast(pc.cast(times, pa.timestamp("s"), safe=False), pa.int64())
        interactions = interactions.set_column(interactions.column_names.index("timestamp"), "timestamp", times)
    interactions = _as_text(interactions.select(["user_id", "item_id", "timestamp"]), interactions_path)
    items = _as_text(items, items_path)
    raw.require_ids(interactions, interactions_path, "user_id", "item_id")
    raw.require_ids(items, items_path, "item_id")
    seconds = raw.to_seconds(interactions, "timestamp", interactions_path)
    return raw.RawData(
        items,
        interactions.set_column(2, "timestamp", seconds),
        [interactions_path, items_path],
    )


def _read(path: Path) -> pa.Table:
    if ".csv" in path.suffixes:
        return raw.read_delimited(path)
    try:
        table = parquet.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {raw.first_line(error)}") from None
    if not len(table):
        raise UserError(f"{path} has no rows")
    return table


def _as_text(table: pa.Table, path: Path) -> pa.Table:
    columns = {}
    for name in table.column_names:
        try:
            columns[name] = pc.fill_null(pc.cast(table[name], pa.string()), "")
        except pa.ArrowException:
            raise UserError(f"{path}: column {name!r} ({table[name].type}) cannot be read as text") from None
    return pa.table(columns)
