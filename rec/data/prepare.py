"""Filters and the prepared folder: parquet, counts of everything left out, and a content hash.

The same input and options give the same bytes.
"""

import hashlib
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import parquet

from rec.data.raw import RawData, require_unique_items
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
    require_unique_items(raw)
    counts = dict(raw.dropped)
    read = len(raw.interactions) + sum(raw.dropped.values())
    data = _Encoded.of(raw.interactions)
    kept = _select(data, filters, counts)
    if not len(kept):
        raise UserError(
            f"no interaction of {raw.files[0] if raw.files else source} is left after filtering"
            f" (read {read}, left out: {_phrase(counts)}); lower k_core or check the file"
        )
    tables, without_text = _index(raw, data, kept)
    tables[INTERACTIONS], split_counts = _split(tables[INTERACTIONS], filters)
    counted = {
        "read": read,
        "left_out": counts,
        "users": len(tables[USERS]),
        "items": len(tables[ITEMS]),
        "interactions": len(tables[INTERACTIONS]),
        "items_without_text": without_text,
        "item_rows": raw.item_rows,
        **split_counts,
    }
    try:
        return _write(out, tables, {"schema_version": SCHEMA_VERSION, **wanted, "counts": counted})
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from error


@dataclass
class _Encoded:
    """Interactions as numbers: [interactions] codes of users and items, by first occurrence, and times.

    ``times`` are seconds; ``parts`` of a second order what these leave equal, and are not written anywhere.
    """

    users: np.ndarray
    user_names: pa.Array
    items: np.ndarray
    item_names: pa.Array
    times: np.ndarray
    parts: np.ndarray | None

    @classmethod
    def of(cls, table: pa.Table) -> "_Encoded":
        parts = table["subsecond"].to_numpy() if "subsecond" in table.column_names else None
        return cls(*_encode(table["user_id"]), *_encode(table["item_id"]), table["timestamp"].to_numpy(), parts)

    def by_time(self, owners: np.ndarray) -> np.ndarray:
        """Row numbers, sorted by owner, then time, then source order (the sort is stable)."""
        return np.lexsort((self.times, owners) if self.parts is None else (self.parts, self.times, owners))

    def of_rows(self, rows: np.ndarray, users: np.ndarray, items: np.ndarray) -> "_Encoded":
        """Those of ``rows`` [kept], with new codes of ``users`` and ``items`` [kept]."""
        parts = None if self.parts is None else self.parts[rows]
        return replace(self, users=users, items=items, times=self.times[rows], parts=parts)


def _select(data: _Encoded, filters: Filters, counts: dict[str, int]) -> np.ndarray:
    """The rows [kept] that every filter keeps, ascending; adds what each left out to ``counts``."""
    rows = np.arange(len(data.users))
    if filters.repeats == "drop":
        order = data.by_time(data.users)
        pairs = data.users[order].astype(np.int64) * len(data.item_names) + data.items[order]
        rows = np.sort(order[np.unique(pairs, return_index=True)[1]])
        counts["repeats"] = len(data.users) - len(rows)
    core = _k_core(data, rows, filters.k_core)
    counts["k_core"] = len(rows) - len(core)
    long_enough = np.bincount(data.users[core], minlength=len(data.user_names)) >= filters.min_length
    kept = core[long_enough[data.users[core]]]
    counts["min_length"] = len(core) - len(kept)
    return kept


def _index(raw: RawData, data: _Encoded, kept: np.ndarray) -> tuple[dict[str, pa.Table], int]:
    """The three tables of a prepared folder, and how many items have no text."""
    new_user = _renumber(np.unique(data.users[kept]), len(data.user_names))
    item_table, new_item, without_text = _index_items(raw.items, np.unique(data.items[kept]), data.item_names)
    data = data.of_rows(kept, new_user[data.users[kept]], new_item[data.items[kept]])
    order = data.by_time(data.users)
    interactions = pa.table(
        {
            "user": pa.array(data.users[order], pa.int32()),
            "item": pa.array(data.items[order] + 1, pa.int32()),
            "timestamp": pa.array(data.times[order], pa.int64()),
        }
    )
    user_table = pa.table({"user_id": data.user_names.take(pa.array(np.flatnonzero(new_user >= 0)))})
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


def _encode(column: pa.ChunkedArray) -> tuple[np.ndarray, pa.Array]:
    """Codes [rows] by first occurrence, and the values that they stand for."""
    if pa.types.is_dictionary(column.type):
        # A dictionary may be in another order, and hold values that no row has.
        chunks = (column.unify_dictionaries() if column.num_chunks > 1 else column).chunks
        codes, old = _encode(pa.chunked_array([chunk.indices for chunk in chunks], column.type.index_type))
        return codes, chunks[0].dictionary.take(old) if chunks else pa.array([], pa.string())
    encoded = pc.dictionary_encode(column)
    if not encoded.num_chunks:
        return np.empty(0, np.int32), pa.array([], column.type)
    encoded = encoded.unify_dictionaries()
    return np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]), encoded.chunk(0).dictionary


def _k_core(data: _Encoded, rows: np.ndarray, k: int) -> np.ndarray:
    """The ``rows`` left when users and items with fewer than ``k`` are dropped until there are none."""
    users, items = data.users[rows], data.items[rows]
    while True:
        enough_user = np.bincount(users, minlength=1) >= k
        enough_item = np.bincount(items, minlength=1) >= k
        keep = enough_user[users] & enough_item[items]
        if keep.all():
            return rows
        users, items, rows = users[keep], items[keep], rows[keep]


def _renumber(survivors: np.ndarray, size: int) -> np.ndarray:
    new = np.full(size, -1, dtype=np.int32)
    new[survivors] = np.arange(len(survivors))
    return new


def _index_items(items: pa.Table, survivors: np.ndarray, names: pa.Array) -> tuple[pa.Table, np.ndarray, int]:
    """The surviving rows of the item table, the new number of each old code, and how many have no text.

    An item that is interacted with but not described stays, with empty text, at the end.
    """
    items = items.cast(pa.schema([(name, pa.string()) for name in items.column_names]))  # an empty one has no types
    kept = names.take(pa.array(survivors))
    rows = pc.fill_null(pc.index_in(kept, value_set=items["item_id"]), len(items))
    order = pc.sort_indices(pa.table({"row": rows, "name": kept}), [("row", "ascending"), ("name", "ascending")])
    new = np.full(len(names), -1, dtype=np.int32)
    new[survivors[order.to_numpy()]] = np.arange(len(survivors))
    rows = rows.take(order)
    described = pc.if_else(pc.less(rows, len(items)), rows, None)
    columns, without_text = {"item_id": kept.take(order)}, np.ones(len(survivors), dtype=bool)
    for name in items.column_names:
        if name != "item_id":
            values = pc.utf8_trim_whitespace(pc.fill_null(items[name].take(described), ""))
            columns[name] = values
            without_text &= pc.equal(values, "").to_numpy()
    return pa.table(columns).combine_chunks(), new, int(without_text.sum())


def _write(out: Path, tables: dict[str, pa.Table], meta: dict[str, Any]) -> dict[str, Any]:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.beside(out)
    try:
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
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return meta


def _raw_hash(paths: list[Path]) -> str:
    return hashlib.sha256("".join(files.sha256_file(path) for path in paths).encode()).hexdigest()[:16]


def _phrase(counts: dict[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in counts.items() if count) or "none"
