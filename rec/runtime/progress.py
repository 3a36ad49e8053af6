"""Progress for people: a live bar on a terminal, a plain line now and then in a log."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

PLAIN_EVERY_S = 10.0


class Advance(Protocol):
    """Called with the number of finished units, parts of one included, and a short status."""

    def __call__(self, done: float, status: str = "") -> None: ...


@contextlib.contextmanager
def progress(title: str, total: int, shown: bool = True) -> Iterator[Advance]:
    """Show how far a stage is; yields a function that takes the units done so far and a status text."""
    if not shown:
        yield lambda done, status="": None
        return
    if sys.stderr.isatty():
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[status]}"),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(title, total=total, status="")
            yield lambda done, status="": bar.update(task, completed=done, status=status)
        return

    last = time.monotonic()

    def plain(done: float, status: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            log.info("%s: %d/%d %s", title, done, total, status)

    yield plain
