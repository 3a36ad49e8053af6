"""RecBole atomic files: tab-separated, one header line of ``name:type`` fields."""

import logging
from pathlib import Path

import pyarrow as pa

from rec.data import raw, textfile
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)


def read(folder: Path, min_rating: float | None = None) -> raw.RawData:
    """Read ``NAME.inter`` and ``NAME.item`` (also ``.gz``) of one folder; ``folder`` may be the ``.inter`` file itself.

    Text columns keep RecBole's names (ML-100K: ``movie_title``, ``release_year``, ``class``). Without a ``.item``
    file, items have no text.

    Args:
        folder: of one data set.
        min_rating: leave out lower values of the column ``rating`` (counted as ``rating_too_low``).

    Raises:
        UserError: if a required column is missing, or several data sets lie in the folder.
    """
    if not folder.exists():
        raise UserError(f"raw data not found: {folder}")
    here = [folder] if folder.is_file() else sorted(folder.iterdir())
    found = [path for path in here if path.name.endswith((".inter", ".inter.gz"))]
    if len(found) != 1:
        count = len(found) if folder.is_dir() else 0
        raise UserError(f"{folder} should hold one .inter file of RecBole's atomic files, it holds {count}")
    inter_path = found[0]
    name = inter_path.name.removesuffix(".gz").removesuffix(".inter")
    item_path = raw.find_optional(inter_path.parent, f"{name}.item")
    rated = ["rating"] if min_rating is not None else []
    inter = _read_atomic(inter_path, ["user_id", "item_id", "timestamp", *rated], ["user_id", "item_id"])
    raw.require_ids(inter, inter_path, "user_id", "item_id")
    interactions = raw.read_times(inter.select(["user_id", "item_id"]), inter, "timestamp", inter_path)
    dropped: dict[str, int] = {}
    if min_rating is not None:
        ratings = raw.cast_strings(inter["rating"], pa.float64(), inter_path, "rating", "a number")
        interactions = raw.keep_rated(interactions, ratings, min_rating, dropped)
    options = {} if min_rating is None else {"min_rating": str(min_rating)}
    if item_path is None:
        log.warning("%s is absent: the items have no text", inter_path.with_name(f"{name}.item"))
        return raw.RawData(raw.items_without_text(), interactions, [inter_path], dropped, options)
    items = _read_atomic(item_path)
    raw.require_columns(items.column_names, item_path, "item_id")
    raw.require_ids(items, item_path, "item_id")
    return raw.RawData(items, interactions, [inter_path, item_path], dropped, options)


def _read_atomic(path: Path, wanted: list[str] | None = None, ids: list[str] | None = None) -> pa.Table:
    typed = textfile.header(path, "\t", quoted=False)
    plain = [name.partition(":")[0] for name in typed]
    if len(set(plain)) < len(plain):
        raise UserError(f"{path}: the header line has repeated column names: {' '.join(typed)}")
    raw.require_columns(plain, path, *(wanted or ()))
    full = dict(zip(plain, typed, strict=True))
    table = textfile.read_delimited(
        path,
        "\t",
        quoted=False,
        wanted=[full[name] for name in wanted] if wanted else None,
        ids=[full[name] for name in ids or ()],
    )
    return table.rename_columns(wanted or plain)
