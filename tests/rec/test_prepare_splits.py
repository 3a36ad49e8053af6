"""The four kinds of split: which interaction is for what, and that nothing leaks into training."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from rec.data.prepare import META, Filters, prepare
from rec.data.prepared import Prepared
from rec.data.raw import RawData
from rec.data.splits import CONTEXT, TEST, TRAIN, VALID, assign
from rec.runtime import config
from rec.runtime.errors import UserError

KINDS = ["leave-one-out", "ratio", "time", "users"]


def load(tmp_path: Path, rows: list[tuple[str, str, int]], **filters) -> Prepared:
    """Prepared, loaded and with its row of ``meta.json`` counts."""
    (tmp_path / "raw.txt").write_text(repr(rows))
    users, items, times = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": items, "timestamp": pa.array(times, pa.int64())})
    titles = pa.table({"item_id": sorted(set(items)), "title": sorted(set(items))})
    out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
    prepare("t", RawData(titles, table, [tmp_path / "raw.txt"]), out, Filters(k_core=0, **filters))
    return Prepared.load(out)


def random_rows(seed: int, n: int = 800, n_users: int = 60) -> list[tuple[str, str, int]]:
    rng = np.random.default_rng(seed)
    users, items, times = rng.zipf(1.5, n) % n_users, rng.zipf(1.3, n) % 90, rng.integers(200, size=n)
    return [(f"u{u}", f"i{i}", int(t)) for u, i, t in zip(users, items, times, strict=True)]


def parts_of(data: Prepared) -> dict[str, list[int]]:
    bounds = zip(data.user_ids, data.offsets[:-1], data.offsets[1:], strict=True)
    return {user: data.part[begin:end].tolist() for user, begin, end in bounds}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cold_items", ["keep", "drop"])
@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_split_training_comes_first_and_counts_add_up(tmp_path, kind, cold_items, seed):
    data = load(tmp_path, random_rows(seed), split=kind, cold_items=cold_items)
    counts = data.meta["counts"]
    assert sum(counts["parts"].values()) == counts["interactions"] == len(data.part)
    assert list(counts["parts"].values()) == torch.bincount(data.part.int(), minlength=4).tolist()
    for user, part in parts_of(data).items():
        assert part == sorted(part, key=lambda code: code != TRAIN), user
    trained = set(data.sequence[data.part == TRAIN].tolist())
    for split in ("valid", "test"):
        users, ends = data.instances(split)
        assert (ends > data.offsets[users]).all(), "every target has a history"
        assert (ends < data.offsets[users + 1]).all()
        assert (ends.diff() > 0).all()
        assert (data.part[ends] == {"valid": VALID, "test": TEST}[split]).all()
        assert torch.equal(data.targets(split), data.sequence[ends])
        cold = sum(item not in trained for item in data.targets(split).tolist())
        assert cold == (0 if cold_items == "drop" else counts["cold_targets"][split])
        rows = torch.arange(len(ends)).flip(0)
        windows, lengths = data.histories(split, rows, 7)
        for row, window, length in zip(rows.tolist(), windows.tolist(), lengths.tolist(), strict=True):
            begin = int(data.offsets[users[row]])
            assert window[:length] == data.sequence[begin : int(ends[row])].tolist()[-7:]


def test_ratio_gives_each_user_the_last_shares_and_at_least_one_to_train(tmp_path):
    lengths = {"a": 1, "b": 2, "c": 3, "d": 9, "e": 10, "f": 30}
    rows = [(user, f"i{step}", step) for user, length in lengths.items() for step in range(length)]
    parts = parts_of(load(tmp_path, rows, split="ratio", min_length=1))
    shares = {user: (part.count(TRAIN), part.count(VALID), part.count(TEST)) for user, part in parts.items()}
    assert shares == {"a": (1, 0, 0), "b": (1, 0, 1), "c": (1, 1, 1), "d": (7, 1, 1), "e": (8, 1, 1), "f": (24, 3, 3)}
    assert all(part == sorted(part) for part in parts.values())
    parts = parts_of(load(tmp_path, rows, split="ratio", min_length=1, valid_fraction=0, test_fraction=0.29))
    assert {part.count(VALID) for part in parts.values()} == {0}
    assert [part.count(TEST) for part in parts.values()] == [0, 1, 1, 2, 2, 8]


@pytest.mark.parametrize("seed", range(3))
def test_time_cuts_everyone_at_the_same_two_moments(tmp_path, seed):
    data = load(tmp_path, random_rows(seed), split="time", min_length=1)
    train, later = data.timestamps[data.part == TRAIN], data.timestamps[data.part != TRAIN]
    assert train.max() < later.min()
    valid, test = (data.timestamps[data.part == code] for code in (VALID, TEST))
    assert valid.max() < test.min()
    assert len(train) == pytest.approx(0.8 * len(data.part), abs=12)  # 4 interactions share a moment
    assert len(test) == pytest.approx(0.1 * len(data.part), abs=12)


def test_a_user_without_training_interactions_is_a_target_after_the_first_one(tmp_path):
    rows = [("old", f"i{step % 4}", step) for step in range(16)]
    rows += [("new", "i0", 17), ("new", "i1", 18), ("new", "i9", 19), ("once", "i1", 18)]
    data = load(tmp_path, rows, split="time", min_length=1, valid_fraction=0.2)
    assert parts_of(data)["new"] == [CONTEXT, TEST, TEST]
    assert parts_of(data)["once"] == [CONTEXT]
    assert data.train_ends.tolist() == [14, 16, 19]
    assert data.train_ends[1:].tolist() == data.offsets[1:-1].tolist()
    assert data.instances("test")[0].tolist() == [1, 1]
    assert data.histories("test", [1], 9)[0].tolist() == [[1, 2]]
    assert data.meta["counts"]["targets_without_history"] == {"valid": 1, "test": 1}
    assert data.meta["counts"]["cold_targets"] == {"valid": 0, "test": 1}
    dropped = load(tmp_path, rows, split="time", min_length=1, valid_fraction=0.2, cold_items="drop")
    assert parts_of(dropped)["new"] == [CONTEXT, TEST, CONTEXT]
    assert dropped.meta["counts"]["cold_targets"] == {"valid": 0, "test": 1}


def test_held_out_users_are_context_up_to_their_last_item(tmp_path):
    rows = [(f"u{user}", f"i{(user + step) % 11}", step) for user in range(40) for step in range(5)]
    data = load(tmp_path, rows, split="users")
    parts = [tuple(part) for part in parts_of(data).values()]
    context = (CONTEXT,) * 4
    assert (parts.count((TRAIN,) * 5), parts.count((*context, VALID)), parts.count((*context, TEST))) == (32, 4, 4)
    again, other = (load(tmp_path, rows, split="users", seed=seed) for seed in (0, 1))
    assert torch.equal(again.part, data.part)
    assert not torch.equal(other.part, data.part)


def test_leave_one_out_instances_are_the_users(tmp_path):
    data = load(tmp_path, random_rows(0))
    for split, back in (("valid", 2), ("test", 1)):
        users, ends = data.instances(split)
        assert users.tolist() == list(range(data.n_users))
        assert torch.equal(ends, data.offsets[1:] - back)
    bare = Prepared(data.folder, data.meta, data.items, data.sequence, data.offsets)
    assert torch.equal(bare.part, data.part)
    assert torch.equal(data.train_ends, data.offsets[1:] - 2)


def test_no_rows_make_no_windows(tmp_path):
    data = load(tmp_path, random_rows(0))
    windows, lengths = data.histories("test", torch.empty(0, dtype=torch.long), 5)
    assert windows.shape == (0, 0)
    assert lengths.shape == (0,)


def test_times_and_user_ids_are_read_when_asked_for(tmp_path):
    rows = [("z", "a", -5), ("y", "b", 2**40), ("z", "b", 7), ("y", "a", 3), ("z", "a", 9), ("y", "a", 1)]
    data = load(tmp_path, rows)
    assert data.user_ids == ["z", "y"]
    assert data.timestamps.tolist() == [-5, 7, 9, 1, 3, 2**40]
    fresh = Prepared.load(data.folder)
    (data.folder / "users.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"is damaged: .*; delete it and prepare again"):
        _ = fresh.user_ids


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"min_length": 2}, "min_length is 2, but split leave-one-out needs at least 3"),
        ({"split": "ratio", "valid_fraction": 0.5, "test_fraction": 0.5}, "let their sum be less than 1"),
        ({"split": "weekly"}, "split: Input should be 'leave-one-out', 'ratio', 'time' or 'users'"),
        ({"split": "time", "min_length": 0}, "min_length: Input should be greater than or equal to 1"),
        ({"split": "ratio", "test_fraction": 0}, "test_fraction: Input should be greater than 0"),
    ],
)
def test_filters_that_do_not_fit_are_one_line(filters, expected):
    with pytest.raises(UserError) as caught:
        config.build(Filters, filters)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "filters", "empty"),
    [
        ([("u", "a", 5), ("u", "b", 5), ("v", "a", 5)], {"split": "time"}, "train"),
        ([("u", "a", 1), ("v", "a", 2), ("w", "a", 3)], {"split": "ratio"}, "test"),
        ([("u", "a", 1), ("u", "b", 2)] * 2, {"split": "users"}, "train"),
        ([("u", "a", 1), ("u", "b", 2), ("u", "c", 3)], {"cold_items": "drop", "min_length": 3}, "test"),
    ],
)
def test_an_empty_part_is_one_line(tmp_path, rows, filters, empty):
    with pytest.raises(UserError, match=f"leaves the {empty} part empty .*; choose another split") as caught:
        load(tmp_path, rows, **{"min_length": 1, **filters})
    assert "\n" not in str(caught.value)


def test_assign_leaves_its_input_alone():
    offsets, items, times = np.array([0, 5, 10]), np.arange(10) % 3 + 1, np.arange(10)
    before = [array.copy() for array in (offsets, items, times)]
    assign(Filters(split="time", k_core=0), offsets, items, times)
    assert all(np.array_equal(array, old) for array, old in zip((offsets, items, times), before, strict=True))


def test_a_folder_of_the_older_schema_asks_to_be_prepared_again(tmp_path):
    data = load(tmp_path, random_rows(0))
    table = parquet.read_table(data.folder / "interactions.parquet")
    parquet.write_table(table.drop_columns("part"), data.folder / "interactions.parquet")
    (data.folder / META).write_text(json.dumps({**data.meta, "schema_version": 1}))
    expected = r"another version of recalign \(its schema_version is 1, this one's is 2\); delete it and prepare again"
    with pytest.raises(UserError, match=expected):
        Prepared.load(data.folder)
    raw = RawData(pa.table({"item_id": ["a"]}), table, [tmp_path / "raw.txt"])
    with pytest.raises(UserError, match=expected):
        prepare("t", raw, data.folder, Filters())


@pytest.mark.parametrize("parts", [[0, 1, 0], [0, 1, 9], [0, -1, 2]])
def test_parts_that_make_no_sense_are_damage(tmp_path, parts):
    data = load(tmp_path, [("u", "a", 1), ("u", "b", 2), ("u", "c", 3)])
    table = parquet.read_table(data.folder / "interactions.parquet").drop_columns("part")
    parquet.write_table(table.append_column("part", pa.array(parts, pa.int8())), data.folder / "interactions.parquet")
    with pytest.raises(UserError, match=r"is damaged: .*; delete it and prepare again"):
        Prepared.load(data.folder)
