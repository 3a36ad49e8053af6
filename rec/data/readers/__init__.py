"""Readers: one public source each, all returning ``rec.data.raw.RawData``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rec.data.raw import RawData
from rec.data.readers import amazon, movielens, online_retail, recbole, sequences, table, yelp

READERS: dict[str, Callable[..., RawData]] = {
    "amazon": amazon.read,
    "movielens": movielens.read,
    "online-retail": online_retail.read,
    "recbole": recbole.read,
    "sequences": sequences.read,
    "table": table.read,
    "yelp": yelp.read,
}


def read(source: str, folder: Path, **options: Any) -> RawData:
    """Read ``folder`` with the reader called ``source``; ``options`` are that reader's keyword arguments."""
    return READERS[source](folder, **options)
