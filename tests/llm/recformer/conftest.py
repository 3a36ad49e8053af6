"""Backbones in folders, made once."""

from pathlib import Path

import pytest
from backbones import save_bert, save_longformer


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """A BERT of 3 layers, width 32, without dropout."""
    return save_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="session")
def longformer(tmp_path_factory) -> Path:
    """A Longformer of the same size."""
    return save_longformer(tmp_path_factory.mktemp("longformer") / "model")
