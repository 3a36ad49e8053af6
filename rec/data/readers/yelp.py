"""The Yelp Open Dataset: reviews and businesses, one JSON object a line."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rec.data import jsonlines, raw
from rec.runtime.errors import UserError

PREFIX = "yelp_academic_dataset_"
TEXT_COLUMNS = ("name", "categories", "city", "state")


def read(folder: Path, min_rating: float | None = None) -> raw.RawData:
    """Read ``yelp_academic_dataset_review.json`` and ``…_business.json`` (also without the prefix, also ``.gz``).

    Items are businesses with ``name``, ``categories``, ``city`` and ``state``; reviews of businesses that the file
    lacks stay. Of several rows for one business the first counts.

    Args:
        folder: the folder, or its file of reviews.
        min_rating: leave out reviews with fewer stars (counted as ``rating_too_low``).
    """
    path = raw.find_file(folder, f"{PREFIX}review.json", "review.json")
    items_path = raw.find_file(path.parent, f"{PREFIX}business.json", "business.json")
    fields = {"user_id": pa.string(), "business_id": pa.string(), "date": pa.string()}
    if min_rating is not None:
        fields["stars"] = pa.float64()
    table = jsonlines.read_fields(path, fields)
    dates = pa.table({"date": pc.cast(table["date"], pa.string())})
    interactions = pa.table(
        {"user_id": table["user_id"], "item_id": table["business_id"], "timestamp": _times(dates, path)}
    )
    dropped: dict[str, int] = {}
    if min_rating is not None:
        interactions = raw.keep_rated(interactions, table["stars"], min_rating, dropped)
    options = {} if min_rating is None else {"min_rating": str(min_rating)}
    items, item_rows = _read_businesses(items_path)
    return raw.RawData(items, interactions, [path, items_path], dropped, options, item_rows)


def _times(dates: pa.Table, path: Path) -> pa.ChunkedArray:
    expected = "a date like 2016-03-09 or 2016-03-09 08:26:00"
    return pc.cast(raw.cast_strings(dates["date"], pa.timestamp("s"), path, "date", expected), pa.int64())


def _read_businesses(path: Path) -> tuple[pa.Table, dict[str, int]]:
    rows: dict[str, list[str]] = {}
    repeated = 0
    for line, found in jsonlines.read_objects(path):
        item = found.get("business_id")
        if not isinstance(item, str) or not item:
            raise UserError(f"{path}, line {line}: business_id is {str(item)[:80]!r}, not an id")
        if item in rows:
            repeated += 1
        else:
            rows[jsonlines.clean(item)] = [_text(found.get(name)) for name in TEXT_COLUMNS]
    columns = {"item_id": pa.array(rows, pa.string())}
    for place, name in enumerate(TEXT_COLUMNS):
        columns[name] = pa.array([row[place] for row in rows.values()], pa.string())
    return pa.table(columns), {"repeated": repeated} if repeated else {}


def _text(value: Any) -> str:
    parts = value if isinstance(value, list) else [value]  # categories were a list until 2017
    return jsonlines.clean(", ".join(str(part) for part in parts if isinstance(part, str | int | float)))
