"""Commands as they are typed, in this process: to start Python anew costs seconds, and tests nothing more."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch import cli


@pytest.fixture
def recalign(monkeypatch, capsys) -> Iterator[Callable[..., tuple[int, str, str]]]:
    """Runs a command in this process; gives its exit code, output and errors."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["recalign", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield call
    # The command logs to this test's standard error, which will be gone.
    root.handlers[:], root.level = handlers, level
