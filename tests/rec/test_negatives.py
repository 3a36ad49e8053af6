"""Sampled candidates: distinct, never the target or what is excluded, the same for everybody."""

import pytest
import torch

from rec import negatives as module
from rec.negatives import draw_negatives
from rec.protocol import Protocol
from rec.runtime.errors import UserError


def sampled(**options) -> Protocol:
    return Protocol(candidates="sampled", negatives=8, **options)


@pytest.mark.parametrize("part", ["valid", "test"])
@pytest.mark.parametrize("source", ["uniform", "popularity"])
@pytest.mark.parametrize("exclude", ["history", "everything"])
def test_negatives_are_distinct_and_never_excluded(small_data, part, source, exclude):
    drawn = draw_negatives(sampled(negatives_from=source, negatives_exclude=exclude), small_data, part)
    users, ends = small_data.instances(part)
    assert drawn.shape == (len(users), 8)
    outside_history = 0
    for user, end, row in zip(users.tolist(), ends.tolist(), drawn.tolist(), strict=True):
        until = small_data.offsets[user + 1] if exclude == "everything" else end + 1
        taken = set(small_data.sequence[small_data.offsets[user] : until].tolist())
        assert len(set(row)) == 8
        assert min(row) >= 1
        assert max(row) <= small_data.n_items
        assert not taken & set(row)
        outside_history += len(set(row) & set(small_data.sequence[end:][:2].tolist()))
    assert outside_history or exclude == "everything" or part == "test"


def test_negatives_are_a_function_of_the_seed(small_data):
    first = draw_negatives(sampled(), small_data, "test")
    assert torch.equal(first, draw_negatives(sampled(), small_data, "test"))
    assert not torch.equal(first, draw_negatives(sampled(negatives_seed=1), small_data, "test"))
    assert not torch.equal(first, draw_negatives(sampled(), small_data, "valid"))


def test_popular_items_are_drawn_more_often(small_data, monkeypatch):
    monkeypatch.setitem(vars(small_data), "train_counts", torch.tensor([0] + [1] * 15 + [50] * 15))
    drawn = draw_negatives(sampled(negatives_from="popularity"), small_data, "test")
    assert (drawn > 15).double().mean() > 0.6


def test_too_small_a_catalog_is_one_clear_line(small_data):
    with pytest.raises(UserError, match=r"29 negatives cannot be drawn for user number \d+"):
        draw_negatives(Protocol(candidates="sampled", negatives=29), small_data, "test")


def test_blocks_only_bound_memory(small_data, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_CELLS", 31 * 7)
    drawn = draw_negatives(sampled(), small_data, "test")
    assert drawn.shape == (small_data.n_users, 8)
    targets = small_data.targets("test")
    for row, target in zip(drawn.tolist(), targets.tolist(), strict=True):
        assert len(set(row)) == 8
        assert target not in row


def test_cold_items_fill_up_where_popular_ones_run_out(small_data, monkeypatch):
    monkeypatch.setitem(vars(small_data), "train_counts", torch.tensor([0] + [0] * 25 + [50] * 5))
    assert draw_negatives(sampled(negatives_from="popularity"), small_data, "test").min() >= 1


def test_an_item_with_nearly_all_the_weight_does_not_make_drawing_spin(small_data, monkeypatch):
    """Rejection alone would need a million draws for every negative after the first; weights still count."""
    counts = torch.tensor([0, 10**9, *[1] * 20, *[100] * 9])
    monkeypatch.setitem(vars(small_data), "train_counts", counts)
    drawn = draw_negatives(sampled(negatives_from="popularity"), small_data, "test")
    for row, target in zip(drawn.tolist(), small_data.targets("test").tolist(), strict=True):
        assert len(set(row)) == 8
        assert target not in row
    assert (drawn[:, 1:4] > 21).double().mean() > 0.7
