"""Leave-one-out, histories and windows of a prepared folder."""

import shutil
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from rec.data.prepare import Filters, prepare
from rec.data.prepared import Prepared
from rec.data.raw import RawData
from rec.runtime.errors import UserError

SEQUENCES = [[1, 2, 3], [4, 3, 2, 1, 5, 6], [6, 6, 1, 2]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "raw.txt").write_text("")
    pairs = [(user, item) for user, sequence in enumerate(SEQUENCES) for item in sequence]
    table = {"user_id": [f"u{user}" for user, _ in pairs], "item_id": [f"i{item}" for _, item in pairs]}
    times = {"timestamp": pa.array(range(len(pairs)), pa.int64())}
    items = pa.table({"item_id": [f"i{item}" for item in range(1, 7)], "title": list("ABCDEF")})
    raw = RawData(items, pa.table(table | times), [tmp_path / "raw.txt"])
    prepare("t", raw, tmp_path / "out", Filters(k_core=0))
    return tmp_path / "out"


def test_leave_one_out_parts(folder):
    data = Prepared.load(folder)
    assert (data.n_users, data.n_items) == (3, 6)
    assert data.offsets.tolist() == [0, 3, 9, 13]
    assert data.targets("test").tolist() == [sequence[-1] for sequence in SEQUENCES]
    assert data.targets("valid").tolist() == [sequence[-2] for sequence in SEQUENCES]
    parts = [data.sequence[a:b].tolist() for a, b in zip(data.offsets, data.train_ends, strict=False)]
    assert parts == [sequence[:-2] for sequence in SEQUENCES]
    assert data.items["title"][data.targets("test")[0].item() - 1].as_py() == "C"


@pytest.mark.parametrize("max_length", [1, 2, 4, 50])
@pytest.mark.parametrize(("split", "held_out"), [("valid", 2), ("test", 1)])
def test_histories_are_all_before_the_target_cut_to_the_last(folder, max_length, split, held_out):
    data = Prepared.load(folder)
    users = torch.tensor([2, 0, 1])
    windows, lengths = data.histories(split, users, max_length)
    expected = [SEQUENCES[user][:-held_out][-max_length:] for user in users]
    longest = max(map(len, expected))
    assert lengths.tolist() == [len(history) for history in expected]
    assert windows.tolist() == [history + [0] * (longest - len(history)) for history in expected]


def test_test_history_ends_with_the_validation_item(folder):
    data = Prepared.load(folder)
    windows, lengths = data.histories("test", torch.arange(3), 50)
    assert windows[torch.arange(3), lengths - 1].tolist() == data.targets("valid").tolist()


def test_windows_at_the_very_end_and_start_stay_in_their_user(folder):
    data = Prepared.load(folder)
    windows, lengths = data.windows(torch.tensor([2, 1, 0]), torch.tensor([13, 4, 1]), 3)
    assert windows.tolist() == [[6, 1, 2], [4, 0, 0], [1, 0, 0]]
    assert lengths.tolist() == [3, 1, 1]


def test_loading_no_prepared_folder_says_how_to_make_one(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(
            UserError, match=r"is no prepared folder \(no meta.json\); make one with 'recalign prepare'"
        ):
            Prepared.load(folder)


def write_wrong_table(path: Path) -> None:
    parquet.write_table(pa.table({"other": [1]}), path)


def lose_rows(path: Path) -> None:
    parquet.write_table(parquet.read_table(path).slice(0, 2), path)


@pytest.mark.parametrize("name", ["meta.json", "items.parquet", "interactions.parquet"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-30]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"{}"),
        lambda path: path.write_bytes(b"\xff\xfe"),
    ],
    ids=["truncated", "emptied", "replaced", "not text"],
)
def test_a_damaged_file_is_one_line(folder, name, damage):
    damage(folder / name)
    with pytest.raises(UserError, match=r"is damaged: .*; delete it and prepare again") as caught:
        Prepared.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["items.parquet", "interactions.parquet"])
@pytest.mark.parametrize("damage", [Path.unlink, write_wrong_table, lose_rows])
def test_a_lost_or_foreign_table_is_one_line(folder, name, damage):
    damage(folder / name)
    with pytest.raises(UserError, match=r"is damaged: .*; delete it and prepare again") as caught:
        Prepared.load(folder)
    assert "\n" not in str(caught.value)


def test_a_copied_folder_loads_the_same(folder, tmp_path):
    copy = Prepared.load(shutil.copytree(folder, tmp_path / "copy"))
    data = Prepared.load(folder)
    assert torch.equal(copy.sequence, data.sequence)
    assert torch.equal(copy.offsets, data.offsets)
    assert copy.meta == data.meta
