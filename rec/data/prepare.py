"""Filters and the prepared folder: parquet, counts of everything left out, and a content hash.

The same input and options give the same bytes.
"""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from rec.data.raw import RawData
from rec.data.splits import Filters, assign
from rec.runtime import files
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)

META, ITEMS, INTERACTIONS, USERS = "meta.json", "items.parquet", "interactions.parquet", "users.parquet"
SCHEMA_VERSION = 2


def prepare(source: str, raw: RawData, out: Path, filters: Filters) -> dict[str, Any]:
    """Filter, index and write one prepared folder; returns its ``meta.json``.

    Users are numbered from 0 by their first interaction in the source, items from 1 by their place in the item
    table (0 is padding); interactions are sorted by user, then time, then source order.

    Raises:
        UserError: if nothing is left, an item id occurs twice, or ``out`` holds something else or cannot be written.
    """
    wanted = {"source": source, "filters": filters.model_dump(), "raw_sha256": _raw_hash(raw.files)}
    if raw.options:
        wanted["options"] = raw.options
    existing = _existing(out)
    if existing is not None:
        require_schema(existing, out)
        if any(existing.get(key) != wanted.get(key) for key in ("source", "options", "filters", "raw_sha256")):
            raise UserError(f"{out} holds other prepared data; choose another folder or delete it")
        log.info("%s is already prepared", out)
        return existing
    _require_unique_items(raw)
    counts = dict(raw.dropped)
    read = len(raw.interactions) + sum(raw.dropped.values())
    kept = _select(raw.interactions, filters, counts)
    if not kept.any():
        raise UserError(
            f"no interaction of {raw.files[0]} is left after filtering"
            f" (read {read}, left out: {_phrase(counts)}); lower k_core or check the file"
        )
    tables, without_text = _index(raw, kept)
    tables[INTERACTIONS], split_counts = _split(tables[INTERACTIONS], filters)
    counted = {
        "read": read,
        "left_out": counts,
        "users": len(tables[USERS]),
        "items": len(tables[ITEMS]),
        "interactions": len(tables[INTERACTIONS]),
        "items_without_text": without_text,
        **split_counts,
    }
    try:
        return _write(out, tables, {"schema_version": SCHEMA_VERSION, **wanted, "counts": counted})
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error


def _select(table: pa.Table, filters: Filters, counts: dict[str, int]) -> np.ndarray:
    """Mask of the interactions that every filter keeps; adds what each left out to ``counts``."""
    users, user_names = _encode(table["user_id"])
    items, item_names = _encode(table["item_id"])
    times = table["timestamp"].to_numpy()
    keep = np.ones(len(users), dtype=bool)
    if filters.repeats == "drop":
        order = np.lexsort((np.arange(len(times)), times))
        _, first = np.unique(users[order].astype(np.int64) * len(item_names) + items[order], return_index=True)
        keep[:] = False
        keep[order[first]] = True
        counts["repeats"] = int((~keep).sum())
    core = _k_core(users, items, keep, filters.k_core)
    counts["k_core"] = int(keep.sum() - core.sum())
    long_enough = np.bincount(users[core], minlength=len(user_names)) >= filters.min_length
    kept = core & long_enough[users]
    counts["min_length"] = int(core.sum() - kept.sum())
    return kept


def _index(raw: RawData, kept: np.ndarray) -> tuple[dict[str, pa.Table], int]:
    """The three tables of a prepared folder, and how many items have no text."""
    users, user_names = _encode(raw.interactions["user_id"])
    items, item_names = _encode(raw.interactions["item_id"])
    users, items, times = users[kept], items[kept], raw.interactions["timestamp"].to_numpy()[kept]
    new_user = _renumber(np.unique(users), len(user_names))
    item_table, new_item, without_text = _index_items(raw.items, np.unique(items), item_names)
    users, items = new_user[users], new_item[items] + 1
    order = np.lexsort((np.arange(len(times)), times, users))
    interactions = pa.table(
        {
            "user": pa.array(users[order], pa.int32()),
            "item": pa.array(items[order], pa.int32()),
            "timestamp": pa.array(times[order], pa.int64()),
        }
    )
    user_table = pa.table({"user_id": pa.array(user_names[np.flatnonzero(new_user >= 0)])})
    return {ITEMS: item_table, INTERACTIONS: interactions, USERS: user_table}, without_text


def require_schema(meta: dict[str, Any], folder: Path) -> None:
    """Raise a UserError if another version of recalign prepared ``folder``."""
    if meta.get("schema_version", SCHEMA_VERSION) != SCHEMA_VERSION:
        raise UserError(
            f"{folder} was prepared by another version of recalign (its schema_version is {meta['schema_version']},"
            f" this one's is {SCHEMA_VERSION}); delete it and prepare again"
        )


def _split(interactions: pa.Table, filters: Filters) -> tuple[pa.Table, dict[str, Any]]:
    offsets = np.concatenate([[0], np.cumsum(np.bincount(interactions["user"].to_numpy()))])
    part, counts = assign(filters, offsets, interactions["item"].to_numpy(), interactions["timestamp"].to_numpy())
    return interactions.append_column("part", pa.array(part, pa.int8())), counts


def _require_unique_items(raw: RawData) -> None:
    seen = set()
    for row, item in enumerate(raw.items["item_id"].to_pylist(), start=1):
        if item in seen:
            raise UserError(f"{raw.files[-1]}, data row {row}: item_id {item!r} occurs twice")
        seen.add(item)


def _existing(out: Path) -> dict[str, Any] | None:
    if (out / META).is_file():
        try:
            existing = files.read_json(out / META)
        except (OSError, ValueError) as error:
            raise UserError(f"{out / META} cannot be read: {error}; delete {out} or choose another folder") from error
        return existing if isinstance(existing, dict) else {}
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no prepared folder; choose another one")
    return None


def _encode(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Codes by first occurrence, and the values that they stand for."""
    encoded = pc.dictionary_encode(column).combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        encoded = encoded.chunk(0)
    return encoded.indices.to_numpy(), encoded.dictionary.to_numpy(zero_copy_only=False)


def _k_core(users: np.ndarray, items: np.ndarray, keep: np.ndarray, k: int) -> np.ndarray:
    keep = keep.copy()
    while True:
        enough_user = np.bincount(users[keep], minlength=int(users.max(initial=0)) + 1) >= k
        enough_item = np.bincount(items[keep], minlength=int(items.max(initial=0)) + 1) >= k
        smaller = keep & enough_user[users] & enough_item[items]
        if smaller.sum() == keep.sum():
            return keep
        keep = smaller


def _renumber(survivors: np.ndarray, size: int) -> np.ndarray:
    new = np.full(size, -1, dtype=np.int64)
    new[survivors] = np.arange(len(survivors))
    return new


def _index_items(items: pa.Table, survivors: np.ndarray, names: np.ndarray) -> tuple[pa.Table, np.ndarray, int]:
    """The surviving rows of the item table, the new number of each old code, and how many have no text.

    An item that is interacted with but not described stays, with empty text, at the end.
    """
    row_of = {item: row for row, item in enumerate(items["item_id"].to_pylist())}
    undescribed = len(row_of)
    order = sorted(survivors, key=lambda code: (row_of.get(names[code], undescribed), names[code]))
    new = np.full(len(names), -1, dtype=np.int64)
    new[order] = np.arange(len(order))
    rows = [row_of.get(names[code]) for code in order]
    text_columns = [name for name in items.column_names if name != "item_id"]
    columns: dict[str, Any] = {"item_id": [names[code] for code in order]}
    for name in text_columns:
        values = items[name].to_pylist()
        columns[name] = ["" if row is None else str(values[row] or "").strip() for row in rows]
    table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
    without = sum(not any(columns[name][row] for name in text_columns) for row in range(len(order)))
    return table, new, without


def _write(out: Path, tables: dict[str, pa.Table], meta: dict[str, Any]) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.parent / f"{files.TEMPORARY_PREFIX}{out.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    digest = hashlib.sha256()
    for name, table in tables.items():
        parquet.write_table(table, temporary / name, compression="zstd")
        digest.update(files.sha256_file(temporary / name).encode())
    meta["content_hash"] = digest.hexdigest()[:16]
    files.write_json(temporary / META, meta)
    if out.exists():
        out.rmdir()  # empty, as checked above
    files.publish_folder(temporary, out)
    return meta


def _raw_hash(paths: list[Path]) -> str:
    return hashlib.sha256("".join(files.sha256_file(path) for path in paths).encode()).hexdigest()[:16]


def _phrase(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count) or "none"
