"""Amazon reviews of 2014, 2018 and 2023 (UCSD): one JSON object a line, and the metadata of the products."""

import html
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rec.data import jsonlines, raw
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
TEXT_COLUMNS = ("title", "brand", "category", "features", "description")
# A tag, or one of which the page's scraper lost the end or the start; "<3" and "a < b" are none.
TAG = re.compile(r'</?[A-Za-z!][^<>]*>|<[A-Za-z]+\s[^<>]*=[^<>]*$|^[^<>]*"\s*/?>')
# A script instead of a product: the data's authors call such rows unformatted.
SCRIPT = "getTime"


def read(folder: Path, min_rating: float | None = None) -> raw.RawData:
    """Read the reviews of one category, and its metadata beside them.

    Reviews are ``NAME.json``, ``NAME_5.json``, ``reviews_NAME_5.json`` or ``NAME.jsonl``, metadata is
    ``meta_NAME.json`` or ``meta_NAME.jsonl``, all plain or ``.gz``; without metadata, items have no text.
    The first review tells the format: reviewerID, asin, unixReviewTime, overall (2014, 2018), or user_id,
    parent_asin (or asin), timestamp in milliseconds, rating (2023).

    Items have ``title``, ``brand`` (2023: store), ``category`` (from broad to narrow, joined by " > "), ``features``
    and ``description``, all without HTML; a title that is a script is left empty. Of several rows for one product
    the first counts; later ones only fill what it leaves empty.

    Args:
        folder: the folder if it holds the reviews of one category only, or their file.
        min_rating: leave out reviews with fewer stars (counted as ``rating_too_low``).
    """
    path = _find_reviews(folder)
    interactions, dropped = _read_reviews(path, min_rating)
    options = {} if min_rating is None else {"min_rating": str(min_rating)}
    meta_path = _find_metadata(path)
    if meta_path is None:
        log.warning("%s has no metadata file meta_… beside it: the items have no text", path)
        return raw.RawData(raw.items_without_text(), interactions, [path], dropped, options)
    items, item_rows = _read_metadata(meta_path, set(pc.unique(interactions["item_id"]).to_pylist()))
    return raw.RawData(items, interactions, [path, meta_path], dropped, options, item_rows)


def _find_reviews(folder: Path) -> Path:
    if folder.is_file():
        return folder
    if not folder.exists():
        raise UserError(f"raw data not found: {folder}")
    found = [path for path in sorted(folder.iterdir()) if path.name.endswith(SUFFIXES)]
    found = [path for path in found if not path.name.startswith("meta_")]
    if len(found) != 1:
        names = f": {', '.join(path.name for path in found)}" if found else ""
        raise UserError(f"{folder} holds {len(found)} files of reviews (.json, .jsonl){names}; name one with --raw")
    return found[0]


def _find_metadata(reviews: Path) -> Path | None:
    name = reviews.name[: reviews.name.index(".")] if "." in reviews.name else reviews.name
    name = name.removeprefix("reviews_")
    names = dict.fromkeys([name, re.sub(r"_\d+$", "", name)])
    candidates = [reviews.with_name(f"meta_{name}{suffix}") for name in names for suffix in SUFFIXES]
    return next((path for path in candidates if path.is_file()), None)


def _read_reviews(path: Path, min_rating: float | None) -> tuple[pa.Table, dict[str, int]]:
    _, first = next(jsonlines.read_objects(path))
    if "reviewerID" in first:
        user, item, time, rating, per_second = "reviewerID", "asin", "unixReviewTime", "overall", 1
    elif "user_id" in first:
        item = "parent_asin" if "parent_asin" in first else "asin"
        time = "timestamp" if "timestamp" in first else "sort_timestamp"
        user, rating, per_second = "user_id", "rating", 1000
    else:
        raise UserError(
            f"{path} holds no Amazon reviews: line 1 has neither reviewerID nor user_id, it has"
            f" {jsonlines.clean(', '.join(first))[:200]!r}"
        )
    fields = {user: pa.string(), item: pa.string(), time: pa.int64()}
    if min_rating is not None:
        fields[rating] = pa.float64()
    table = jsonlines.read_fields(path, fields)
    interactions = pa.table({"user_id": table[user], "item_id": table[item]})
    interactions = raw.add_times(interactions, table[time], per_second)
    dropped: dict[str, int] = {}
    if min_rating is not None:
        interactions = raw.keep_rated(interactions, table[rating], min_rating, dropped)
    return interactions, dropped


def _read_metadata(path: Path, wanted: set[str]) -> tuple[pa.Table, dict[str, int]]:
    rows: dict[str, list[str]] = {}
    counts = {"repeated": 0, "title_is_a_script": 0, "not_reviewed": 0}
    for line, found in jsonlines.read_objects(path, python_literals=True):
        item = found.get("parent_asin", found.get("asin"))
        if not isinstance(item, str | int) or isinstance(item, bool) or item == "":
            raise UserError(f"{path}, line {line}: asin is {str(item)[:80]!r}, not an id")
        item = str(item)
        if item not in wanted:
            counts["not_reviewed"] += 1
        else:
            texts = [_text(found, name) for name in TEXT_COLUMNS]
            if SCRIPT in texts[0]:
                texts[0] = ""
                counts["title_is_a_script"] += 1
            counts["repeated"] += item in rows
            rows[item] = [old or new for old, new in zip(rows.get(item, texts), texts, strict=True)]
    columns = {"item_id": pa.array(rows, pa.string())}
    for place, name in enumerate(TEXT_COLUMNS):
        columns[name] = pa.array([row[place] for row in rows.values()], pa.string())
    return pa.table(columns), {reason: count for reason, count in counts.items() if count}


def _text(found: dict[str, Any], column: str) -> str:
    if column == "title":
        return _plain(found.get("title"))
    if column == "brand":
        return _plain(found.get("brand") or found.get("store"))
    if column == "category":
        categories = found.get("category") or found.get("categories") or found.get("main_category")
        if isinstance(categories, list) and categories and isinstance(categories[0], list):
            categories = categories[0]  # 2014: several paths, the first is the main one
        return " > ".join(filter(None, map(_plain, _strings(categories))))
    if column == "features":
        return " ".join(filter(None, map(_plain, _strings(found.get("feature") or found.get("features")))))
    return " ".join(filter(None, map(_plain, _strings(found.get("description")))))


def _strings(value: Any) -> Iterator[str]:
    """The texts in a text or in lists of lists of them, in order."""
    stack = [value]
    while stack:
        value = stack.pop()
        if isinstance(value, list | tuple):
            stack += reversed(value)
        elif isinstance(value, str | int | float) and not isinstance(value, bool):
            yield str(value)


def _plain(value: Any) -> str:
    """Text without tags, entities, line breaks and runs of blanks."""
    text = " ".join(_strings(value))
    # Entities first: tags are often spelt with them.
    text = TAG.sub(" ", html.unescape(text))
    return " ".join(jsonlines.clean(text).replace("\0", " ").split())
