"""Packages that only some commands need."""

import contextlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator

from rec.runtime.errors import UserError


def require_packages(purpose: str, modules: dict[str, str]) -> None:
    """Raise a UserError with the command that installs them if one of ``modules`` is not there.

    Args:
        purpose: what needs them, the beginning of the message.
        modules: names to import, with the names to install.
    """
    missing = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{purpose} needs {' and '.join(missing)}: pip install {' '.join(modules.values())}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without log lines and warnings: some packages tell every step that they take and every failed attempt."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
