"""Commands as they are typed, in this process: to start Python anew costs seconds and tests nothing more. A recipe."""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from launch import cli

REC = {"model": {"dim": 16, "heads": 2, "blocks": 1, "max_length": 8}, "train": {"batch_size": 8, "epochs": 2}}


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


@pytest.fixture
def recipe(tmp_path, small_data) -> Path:
    """A small recommender's, whose run folder is tmp_path / "run"."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": str(small_data.folder), "run": str(tmp_path / "run"), "rec": REC}))
    return path
