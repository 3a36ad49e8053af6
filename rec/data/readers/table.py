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
    if pa.types.is_temporal(interactions["timestamp"].type):
        seconds = pc.cast(pc.cast(interactions["timestamp"], pa.timestamp("s"), safe=False), pa.int64())
    else:
        texts = interactions.set_column(
            interactions.column_names.index("timestamp"), "timestamp", _as_text(interactions["timestamp"])
        )
        seconds = raw.to_seconds(texts, "timestamp", interactions_path)
    columns = {name: _as_text(items[name]) for name in items.column_names}
    return raw.RawData(
        pa.table(columns),
        pa.table(
            {
                "user_id": _as_text(interactions["user_id"]),
                "item_id": _as_text(interactions["item_id"]),
                "timestamp": seconds,
            }
        ),
        [interactions_path, items_path],
    )


def _read(path: Path) -> pa.Table:
    if ".csv" in path.suffixes:
        return raw.read_delimited(path)
    try:
        return parquet.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file: {error}") from None


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(pc.cast(column, pa.string()), "")
