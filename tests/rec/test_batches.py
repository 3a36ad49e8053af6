"""Training windows: every target once an epoch, nothing held out ever seen."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from rec.batches import NextItemWindows, Pairs, Prefixes
from rec.data.prepared import Prepared
from rec.runtime.errors import UserError


def data_of(lengths: list[int]) -> Prepared:
    """Users with sequences of these lengths; every interaction is an item of its own, so a number tells its place."""
    offsets = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]))
    sequence = torch.arange(1, sum(lengths) + 1)
    return Prepared(Path("made-up"), {}, pa.table({"item_id": sequence.tolist()}), sequence, offsets)


UNEVEN = [3, 4, 5, 6, 7, 8, 11, 12, 13, 30, 3, 100] * 4


@pytest.mark.parametrize("max_length", [1, 2, 5, 9, 200])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_every_training_item_but_the_first_is_a_target_once(max_length, batch_size):
    data = data_of(UNEVEN)
    seen = Counter()
    for batch in NextItemWindows.of(data, "train", max_length, batch_size).epoch(0, 0):
        seen.update(batch.targets[batch.targets > 0].tolist())
    expected = Counter()
    for start, end in zip(data.offsets[:-1].tolist(), data.train_ends.tolist(), strict=True):
        expected.update(data.sequence[start + 1 : end].tolist())
    assert seen == expected


@pytest.mark.parametrize("max_length", [1, 5, 200])
def test_inputs_precede_their_targets_and_padding_is_on_the_right(max_length):
    data = data_of(UNEVEN)
    for batch in NextItemWindows.of(data, "train", max_length, 7).epoch(0, 0):
        inputs, targets = batch.items, batch.targets
        valid = inputs > 0
        assert inputs.shape == targets.shape
        assert 1 <= inputs.shape[1] <= max_length
        assert len(inputs) <= 7
        assert torch.equal(targets > 0, valid)
        assert torch.equal(targets[valid], inputs[valid] + 1), "the next interaction of the same user"
        assert (valid.int().diff(dim=1) <= 0).all()
        assert valid[:, 0].all()
        assert valid.any(dim=0).all(), "no column is padding only"


@pytest.mark.parametrize("max_length", [3, 200])
def test_held_out_items_are_never_seen(max_length):
    data = data_of(UNEVEN)
    held_out = set(data.targets("valid").tolist()) | set(data.targets("test").tolist())
    for batch in NextItemWindows.of(data, "train", max_length, 5).epoch(1, 2):
        assert not held_out & set(batch.items.flatten().tolist())
        assert not held_out & set(batch.targets.flatten().tolist())


def batches_of(data: Prepared, seed: int, epoch: int) -> list[list[list[int]]]:
    return [batch.items.tolist() for batch in NextItemWindows.of(data, "train", 5, 4).epoch(seed, epoch)]


def test_order_is_a_function_of_seed_and_epoch(small_data):
    first = batches_of(small_data, 1, 0)
    assert batches_of(small_data, 1, 0) == first
    assert batches_of(small_data, 1, 1) != first
    assert batches_of(small_data, 2, 0) != first
    # Epochs do not depend on those before them: a resumed run goes on with the same batches.
    windows = NextItemWindows.of(small_data, "train", 5, 4)
    list(windows.epoch(1, 0))
    assert [batch.items.tolist() for batch in windows.epoch(1, 1)] == batches_of(small_data, 1, 1)


@pytest.mark.parametrize("n_users", [1, 31, 32, 33, 64])
def test_length_is_the_number_of_batches(n_users):
    windows = NextItemWindows.of(data_of([6] * n_users), "train", 10, 2)
    assert len(windows) == len(list(windows.epoch(0, 0))) == -(-n_users // 2)


def test_batches_are_little_padding():
    lengths = np.random.default_rng(0).integers(3, 60, size=400).tolist()
    batches = [batch.items for batch in NextItemWindows.of(data_of(lengths), "train", 50, 16).epoch(0, 0)]
    padding = sum((inputs == 0).sum().item() for inputs in batches) / sum(inputs.numel() for inputs in batches)
    assert padding < 0.1


def test_nothing_to_train_on_is_one_line():
    with pytest.raises(
        UserError, match="made-up leaves nothing to train on: its users have too few training interactions"
    ):
        NextItemWindows.of(data_of([3, 3, 3]), "train", 5, 2)
    assert len(NextItemWindows.of(data_of([3, 4]), "train", 5, 2)) == 1


def test_the_last_window_alone_is_each_users_newest_targets():
    data = data_of(UNEVEN)
    seen = Counter()
    for batch in NextItemWindows.of(data, "train", 5, 7, last=True).epoch(0, 0):
        seen.update(batch.targets[batch.targets > 0].tolist())
    expected = Counter()
    for start, end in zip(data.offsets[:-1].tolist(), data.train_ends.tolist(), strict=True):
        expected.update(data.sequence[max(start + 1, end - 5) : end].tolist())
    assert seen == expected


@pytest.mark.parametrize("max_length", [1, 3, 200])
def test_every_prefix_is_a_sample_once(max_length):
    data = data_of(UNEVEN)
    seen = Counter()
    for batch in Prefixes.of(data, "train", max_length, 7, None).epoch(0, 0):
        lengths = (batch.items > 0).sum(1)
        rows = torch.arange(len(lengths))
        assert torch.equal((batch.targets > 0).sum(1), torch.ones_like(lengths))
        targets = batch.targets[rows, lengths - 1]
        assert torch.equal(targets, batch.items[rows, lengths - 1] + 1)
        first = data.offsets[batch.users] + 1  # the number of an item is its place, from 1
        assert torch.equal(batch.items[:, 0], torch.maximum(first, targets - max_length))
        seen.update(targets.tolist())
    expected = Counter()
    for start, end in zip(data.offsets[:-1].tolist(), data.train_ends.tolist(), strict=True):
        expected.update(data.sequence[start + 1 : end].tolist())
    assert seen == expected


def test_some_prefixes_of_each_user_are_others_every_epoch():
    data = data_of(UNEVEN)
    prefixes = Prefixes.of(data, "train", 9, 7, 2)
    epochs = []
    for epoch in range(2):
        batches = list(prefixes.epoch(0, epoch))
        assert len(batches) == len(prefixes)
        users = Counter(user for batch in batches for user in batch.users.tolist())
        counts = (data.train_ends - data.offsets[:-1] - 1).clamp(max=2)
        assert users == Counter({user: count for user, count in enumerate(counts.tolist()) if count})
        epochs.append({item for batch in batches for item in batch.targets.flatten().tolist()})
    assert epochs[0] != epochs[1]


def test_pairs_are_the_training_interactions():
    data = data_of([5, 3, 8])
    seen = [
        (user, target)
        for batch in Pairs.of(data, "train", 4).epoch(0, 0)
        for user, target in zip(batch.users.tolist(), batch.targets[:, 0].tolist(), strict=True)
    ]
    assert sorted(seen) == [(0, 1), (0, 2), (0, 3), (1, 6), *((2, item) for item in range(9, 15))]


def test_training_on_validation_items_adds_exactly_those():
    data = data_of(UNEVEN)
    for kind in (NextItemWindows, Prefixes):
        more = [None] if kind is Prefixes else []
        seen = {
            on: Counter(
                item
                for batch in kind.of(data, on, 9, 7, *more).epoch(0, 0)
                for item in batch.targets[batch.targets > 0].tolist()
            )
            for on in ("train", "train+valid")
        }
        added = seen["train+valid"] - seen["train"]
        assert added == Counter(data.targets("valid").tolist())
