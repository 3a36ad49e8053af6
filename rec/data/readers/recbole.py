"""RecBole atomic files: tab-separated, one header line of ``name:type`` fields."""

from pathlib import Path

import pyarrow as pa

from rec.data import raw
from rec.runtime.errors import UserError


def read(folder: Path) -> raw.RawData:
    """Read ``NAME.inter`` and ``NAME.item`` of one folder; ``folder`` may be the ``.inter`` file itself.

    Text columns keep RecBole's names (ML-100K: ``movie_title``, ``release_year``, ``class``).

    Raises:
        UserError: if a file or a required column is missing, or several data sets lie in the folder.
    """
    if not folder.exists():
        raise UserError(f"raw data not found: {folder}")
    found = [folder] if folder.suffix == ".inter" else sorted(folder.glob("*.inter"))
    if len(found) != 1:
        raise UserError(f"{folder} should hold one .inter file of RecBole's atomic files, it holds {len(found)}")
    inter_path, item_path = found[0], found[0].with_suffix(".item")
    inter = _read_atomic(inter_path)
    raw.require_columns(inter, inter_path, "user_id", "item_id", "timestamp")
    raw.require_ids(inter, inter_path, "user_id", "item_id")
    interactions = pa.table(
        {
            "user_id": inter["user_id"],
            "item_id": inter["item_id"],
            "timestamp": raw.to_seconds(inter, "timestamp", inter_path),
        }
    )
    items = _read_atomic(item_path)
    raw.require_columns(items, item_path, "item_id")
    return raw.RawData(items, interactions, [inter_path, item_path])


def _read_atomic(path: Path) -> pa.Table:
    table = raw.read_delimited(path, delimiter="\t", quoted=False)
    names = [name.partition(":")[0] for name in table.column_names]
    if len(set(names)) < len(names):
        raise UserError(f"{path}: the header line has repeated column names: {' '.join(table.column_names)}")
    return table.rename_columns(names)
