"""Readers: one public source each, all returning ``rec.data.raw.RawData``."""

from collections.abc import Callable
from pathlib import Path

from rec.data.raw import RawData
from rec.data.readers import movielens, online_retail, recbole, table

READERS: dict[str, Callable[..., RawData]] = {
    "recbole": recbole.read,
    "movielens": movielens.read,
    "online-retail": online_retail.read,
    "table": table.read,
}


def read(source: str, folder: Path, **options: str) -> RawData:
    """Read ``folder`` with the reader called ``source``."""
    return READERS[source](folder, **options)
