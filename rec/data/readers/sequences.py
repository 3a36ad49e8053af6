"""One line a user: ``user item1 item2 …``, oldest first (S3-Rec and its successors)."""

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rec.data import raw, textfile
from rec.data.readers import table
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)


def read(folder: Path) -> raw.RawData:
    """Read the one ``.txt`` of a folder, or a file; ``items.{csv,parquet}`` (item_id, text …) beside it if there.

    Ids are separated by white space. Time is the position in the line, from 0: only the order within a user means
    something, so a split by time does not.

    Raises:
        UserError: naming the line of a user without items or of a user that was there before.
    """
    path = _find(folder)
    users, lengths, items, numbers = [], [], [], []
    for number, block in textfile.lines(path):
        rows = pa.array(block.decode().split("\n"))
        words = pc.ascii_split_whitespace(pc.ascii_trim_whitespace(rows))
        sizes = pc.list_value_length(words).to_numpy()
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        flat = pc.list_flatten(words)
        blank = pc.equal(flat.take(pa.array(starts)), "").to_numpy(zero_copy_only=False)  # "" splits into one ""
        short = np.flatnonzero(~blank & (sizes == 1))
        if len(short):
            raise UserError(f"{path}, line {number + short[0]}: a user without items (or an item without a user)")
        starts, sizes = starts[~blank], sizes[~blank]
        is_item = np.ones(len(flat), dtype=bool)
        is_item[np.concatenate([starts, np.flatnonzero(pc.equal(flat, "").to_numpy(zero_copy_only=False))])] = False
        users.append(flat.take(pa.array(starts)))
        items.append(flat.filter(pa.array(is_item)).dictionary_encode())
        lengths.append(sizes - 1)
        numbers.append(number + np.flatnonzero(~blank))
    interactions = _interactions(path, pa.chunked_array(users, pa.string()), np.concatenate(lengths), items, numbers)
    items_path = raw.find_optional(path.parent, "items.csv", "items.parquet")
    if items_path is None:
        log.warning("%s holds no items.csv or items.parquet: the items have no text", path.parent)
        return raw.RawData(raw.items_without_text(), interactions, [path])
    return raw.RawData(table.read_items(items_path), interactions, [path, items_path])


def _find(folder: Path) -> Path:
    if folder.is_file():
        return folder
    if not folder.exists():
        raise UserError(f"raw data not found: {folder}")
    found = sorted(path for pattern in ("*.txt", "*.txt.gz") for path in folder.glob(pattern))
    if len(found) != 1:
        names = f": {', '.join(path.name for path in found)}" if found else ""
        raise UserError(f"{folder} holds {len(found)} .txt files of sequences{names}; name one with --raw")
    return found[0]


def _interactions(
    path: Path, users: pa.ChunkedArray, lengths: np.ndarray, items: list[pa.Array], numbers: list[np.ndarray]
) -> pa.Table:
    encoded = users.combine_chunks().dictionary_encode()
    if len(encoded.dictionary) < len(encoded):
        codes = encoded.indices.to_numpy()
        _, first = np.unique(codes, return_index=True)
        again = np.setdiff1d(np.arange(len(codes)), first)[0]
        line = np.concatenate(numbers)[again]
        raise UserError(
            f"{path}, line {line}: user {users[again].as_py()[:80]!r} was there before; each user has one line:"
            " 'user item1 item2 …'"
        )
    owners = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    positions = np.arange(len(owners)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    found = pa.table(
        {
            "user_id": pa.DictionaryArray.from_arrays(pa.array(owners), encoded.dictionary),
            "item_id": pa.chunked_array(items),
            "timestamp": pa.array(positions, pa.int64()),
        }
    )
    return raw.in_one_piece(found)
