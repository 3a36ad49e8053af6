"""Small raw files of every source, for the tests of readers."""

from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from worlds import SHARED_DATA

from rec.data import readers
from rec.data.raw import RawData
from rec.runtime.errors import UserError

HEADER = "user_id,item_id,timestamp\n"
RETAIL_HEADER = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"


def write_files(folder: Path, **contents: str | bytes) -> Path:
    """Files called like the keywords, with ``__`` for the dot."""
    folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


def csv_pair(folder: Path, interactions: str | bytes, items: str | bytes = "item_id,title\na,A\n") -> Path:
    return write_files(folder, interactions__csv=interactions, items__csv=items)


def parquet_pair(folder: Path, timestamps: pa.Array, items: pa.Table | None = None) -> Path:
    rows = range(len(timestamps))
    table = pa.table({"timestamp": timestamps, "user_id": [7] * len(rows), "item_id": [10 + row for row in rows]})
    parquet.write_table(table, folder / "interactions.parquet")
    parquet.write_table(items or pa.table({"item_id": [10, 11], "title": ["A", None]}), folder / "items.parquet")
    return folder


def retail_row(invoice="1", code="85123A", description="LAMP", date="2010-12-01 08:26:00", customer="17850.0") -> str:
    return f"{invoice},{code},{description},6,{date},2.55,{customer},United Kingdom\n"


def rows_of(raw: RawData) -> list[tuple[str, str, int]]:
    return [tuple(row.values()) for row in raw.interactions.select(["user_id", "item_id", "timestamp"]).to_pylist()]


def message_of(source: str, folder: Path, **options: str) -> str:
    """The one line that reading ends with."""
    with pytest.raises(UserError) as caught:
        readers.read(source, folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def shared(name: str) -> Path:
    """A folder of real data; skips the test where it is absent."""
    if not (SHARED_DATA / name).is_dir():
        pytest.skip(f"real data is absent: {SHARED_DATA / name}")
    return SHARED_DATA / name
