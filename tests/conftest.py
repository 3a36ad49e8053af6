"""Small worlds that tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from worlds import SMALL_MODELS, make_raw

from rec.data.prepare import Filters, prepare
from rec.data.prepared import Prepared
from rec.job import RecJob
from rec.runtime.config import build
from rec.runtime.determinism import ASKED, be_deterministic_if_asked
from rec.runtime.memory import keep_freed_memory
from rec.train import run

keep_freed_memory()
if torch.cuda.is_available():  # tests compare bits, which on a GPU are the same for those who ask
    os.environ.setdefault(ASKED, "1")
    be_deterministic_if_asked()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """40 users, 30 items, 14 interactions each, prepared."""
    folder = tmp_path_factory.mktemp("small")
    prepare("test", make_raw(folder / "raw"), folder / "prepared", Filters())
    return Prepared.load(folder / "prepared")


@pytest.fixture(scope="session")
def finished_run(small_data: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the run folder of a model by its name, trained for three epochs on ``small_data`` when first asked for."""
    folders: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(f"run-{name}") / "run"
            model = {"name": name, "dim": 16, **({} if name == "LightGCN" else {"max_length": 8})}
            rec = {
                "model": {**model, **SMALL_MODELS.get(name, {})},
                "train": {"lr": 5e-3, "batch_size": 16, "epochs": 3},
                "evaluate": {"cutoffs": [10]},
            }
            run(build(RecJob, {"data": str(small_data.folder), "run": str(folders[name]), "rec": rec}), "test")
        return folders[name]

    return train
