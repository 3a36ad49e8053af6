"""Attention maps against the attention written out, and the figures on maps that were made by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from launch.elephant import attention
from llm.fused_attention import NAME
from llm.recformer.attention import AttentionMap, attention_map, figures, layer_similarity, stratification
from llm.recformer.batches import SequenceMaker, pad
from llm.recformer.config import RecformerSettings
from llm.recformer.model import load_recformer
from llm.recformer.text import tokenise
from rec.runtime.config import build


def setting(folder: Path, small_data):
    size = {"max_items": 6, "max_tokens": 48, "attention_window": 4}
    config = build(
        RecformerSettings, {"backbone": str(folder), "size": size, "text": {"attributes": ["title", "kind"]}}
    )
    model, tokenizer = load_recformer(config)
    tokens = tokenise(small_data.items, ["title", "kind"], 32, tokenizer)
    return config, model, SequenceMaker(tokens, config.size, tokenizer.cls_token_id), tokenizer


def test_the_map_of_cls_is_the_softmax_of_its_query_with_all_keys(bert, small_data):
    _, model, maker, tokenizer = setting(bert, small_data)
    own = attention_map(model, maker, np.array([4, 5, 6]), tokenizer.pad_token_id)
    length = int(maker([np.array([4, 5, 6])]).lengths[0])
    assert own.cls.shape == (3, 4, length)
    torch.testing.assert_close(own.cls.sum(-1), torch.ones(3, 4))
    batch = pad(maker([np.array([4, 5, 6])]), np.array([0]), 0)
    words = model.backbone.get_input_embeddings()(batch.ids)
    inputs = words + model.token_types(batch.types) + model.item_positions(batch.items)
    hidden = model.eval().backbone.embeddings(inputs_embeds=inputs)
    layer = model.layers[0].attention.self
    query, key = (part(hidden)[0].view(length, 4, 8) for part in (layer.query, layer.key))
    for head in range(4):
        scores = key[:, head] @ query[0, head] / math.sqrt(8)
        torch.testing.assert_close(own.cls[0, head], scores.softmax(0), rtol=1e-4, atol=1e-6)
    assert own.first_tokens.tolist() == [1, *(np.flatnonzero(np.diff(own.items[1:])) + 2)]
    assert model.backbone.config._attn_implementation == NAME  # as before


def test_a_longformers_map_is_that_of_its_global_token(longformer, small_data):
    _, model, maker, tokenizer = setting(longformer, small_data)
    own = attention_map(model, maker, np.array([4, 5, 6]), tokenizer.pad_token_id)
    assert own.full is None
    torch.testing.assert_close(own.cls.sum(-1), torch.ones(3, 4), rtol=1e-4, atol=1e-4)
    assert figures([own])["inside_item"] is None


def test_figures_of_a_map_made_by_hand():
    items = np.array([0, 1, 1, 2, 2, 2])
    first, newest = torch.tensor([0.2, 0.4, 0, 0.4, 0, 0]), torch.tensor([0.5, 0.25, 0.25, 0, 0, 0])
    cls = torch.stack([torch.stack([first, newest]), torch.stack([newest, newest]), torch.stack([first, first])])
    full = torch.zeros(3, 2, 6, 6)
    full[:, :, 1, 2] = 1  # item 1's first token looks inside
    full[:, :, 3, 1] = 1  # item 2's does not
    found = figures([AttentionMap(cls, full, items, items)])
    assert found["first_token_share"] == pytest.approx([(0.8 + 0.25) / 1.3, 0.5, 1], abs=1e-4)
    assert found["first_token_even"] == pytest.approx(2 / 5)
    assert found["newest_item_share"] == pytest.approx([(0.4 + 0.5) / 1.3, 1, 0.5], abs=1e-4)
    assert found["inside_item"] == [0.5, 0.5, 0.5]
    assert found["head_similarity"] == pytest.approx([0.5, 1, 1], abs=1e-4)


def test_stratification_is_the_similarity_of_neighbours_within_thirds_beyond_that_across():
    profile = torch.eye(3).repeat_interleave(4, dim=0)  # twelve layers in three strata, nothing in common
    cls = torch.cat([torch.zeros(12, 1), profile], dim=1)[:, None]
    own = AttentionMap(cls, None, np.array([0, 1, 1, 2]), np.zeros(4))
    assert stratification(layer_similarity([own])) == pytest.approx(1)
    flat = AttentionMap(torch.ones(12, 1, 4), None, np.array([0, 1, 1, 2]), np.zeros(4))
    assert stratification(layer_similarity([flat, flat])) == pytest.approx(0, abs=1e-6)
    assert stratification(torch.ones(3, 3)) is None  # every third is one layer
    # Layers that only change little by little are no strata, though those of one third are nearer to each other.
    layers = torch.arange(6.0)
    assert stratification(1 - 0.1 * (layers[:, None] - layers).abs()) == pytest.approx(0, abs=1e-6)


def test_lines_and_names_of_the_picture_are_where_its_items_are():
    items = np.array([0, 1, 1, 1, 2, 3, 3])
    cls = torch.rand(6, 2, 7)
    own = AttentionMap(cls, None, items, items)
    figure = attention.draw({"backbone": own, "tuned": own})
    for layer in range(6):
        axis = figure.axes[2 * layer + 1]
        [image] = axis.images
        assert image.get_array().data.tolist() == cls[layer, :, 1:].tolist()  # [CLS] itself is not drawn
        lines = [line.get_xdata()[0] for line in axis.lines]
        drawn = items[1:]
        assert [(drawn[int(x - 0.5)], drawn[int(x + 0.5)]) for x in lines] == [(1, 2), (2, 3)]
    names = {label.get_text(): x for label, x in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True)}
    assert names == {"item 1": 1, "item 2": 3, "item 3": 4.5}


def test_both_models_are_drawn_side_by_side(bert, small_data, tmp_path):
    config, model, _, tokenizer = setting(bert, small_data)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    found = attention.analyse(config, tmp_path / "tuned", small_data, tmp_path / "tokens", tmp_path, 5)
    assert found["backbone"] == found["tuned"]
    assert found["tuned"]["histories"] == 5
    assert len(found["tuned"]["layer_similarity"]) == 3
    assert (tmp_path / "attention.png").stat().st_size > 5_000


def test_histories_that_are_all_too_short_leave_no_figures_and_no_error(bert, small_data, tmp_path, monkeypatch):
    config, model, _, tokenizer = setting(bert, small_data)
    model.save_pretrained(tmp_path / "tuned")
    tokenizer.save_pretrained(tmp_path / "tuned")
    monkeypatch.setattr(attention, "SHOWN_ITEMS", 99)
    assert attention.analyse(config, tmp_path / "tuned", small_data, tmp_path / "tokens", tmp_path / "out") == {}
