"""Readers: one public source each, all returning ``rec.data.raw.RawData``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rec.data.raw import RawData
from rec.data.readers import amazon, closed_world, movielens, online_retail, recbole, sequences, table, yelp
from rec.runtime.errors import UserError

READERS: dict[str, Callable[..., RawData]] = {
    "amazon": amazon.read,
    "closed-world": closed_world.read,
    "movielens": movielens.read,
    "online-retail": online_retail.read,
    "recbole": recbole.read,
    "sequences": sequences.read,
    "table": table.read,
    "yelp": yelp.read,
}


def read(source: str, folder: Path | None, **options: Any) -> RawData:
    """Read ``folder`` with the reader called ``source``; ``options`` are that reader's keyword arguments.

    ``closed-world`` makes its data up and reads no folder.

    Raises:
        UserError: with one line, whatever the files hold.
    """
    try:
        return READERS[source](folder, **options)
    except UserError as error:
        # Names and values that a message quotes from a broken file may hold line breaks and control characters.
        message = "".join(letter if letter.isprintable() else " " for letter in str(error))
        raise UserError(message) from error
