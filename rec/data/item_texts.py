"""More texts about the items of any source: a file that joins by ``item_id``."""

import logging
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rec.data.raw import RawData, require_unique_items
from rec.data.readers.table import read_items
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)


def add_item_texts(raw: RawData, path: Path) -> RawData:
    """The source with the further columns of ``path`` (csv or parquet), "" for items that have no row there.

    A column that the source has itself stays as it is. Rows of items that the source does not describe are kept:
    preparing leaves out those without interactions.

    Raises:
        UserError: if the file cannot be read, names an item twice, or no item of the source; if the source does.
    """
    if not path.is_file():
        raise UserError(f"item texts not found: {path}")
    require_unique_items(raw)  # while its rows are those of the source's own file
    texts = read_items(path)
    ids = texts["item_id"]
    if len(pc.unique(ids)) < len(ids):
        counts = pc.value_counts(ids)
        twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"].as_py()
        raise UserError(f"{path}: item_id {twice[:80]!r} occurs twice; keep one row")
    known = pc.unique(raw.interactions["item_id"].combine_chunks()).cast(pa.string())
    if not pc.any(pc.is_in(ids, known)).as_py():
        raise UserError(f"{path} names no item of the interactions; its first item_id is {ids[0].as_py()[:80]!r}")
    own = raw.items.column_names
    both = [name for name in texts.column_names if name in own and name != "item_id"]
    if both:
        log.info("%s: the source has columns of its own for %s", path, ", ".join(both))
    table = raw.items.cast(pa.schema([(name, pa.string()) for name in own]))
    order, place = pa.array(range(len(table)), pa.int64()), "order of " + "".join([*own, *texts.column_names])
    # A join keeps no order, and the order of items numbers them.
    joined = (
        table.append_column(place, order)
        .join(texts.drop_columns(both), "item_id", join_type="full outer")
        .sort_by([(place, "ascending"), ("item_id", "ascending")])
        .drop_columns([place])
    )
    more = [name for name in texts.column_names if name not in own]
    columns = {name: pc.fill_null(joined[name], "") for name in [*own, *more]}
    return replace(raw, items=pa.table(columns), files=[*raw.files, path])
