"""``recalign data stats``: the figures are those of the folder, the picture is drawn, mistakes are one line."""

import json
import sys

import numpy as np
import pyarrow as pa
import pytest
from worlds import make_raw

from launch import cli, data_stats
from rec.data.prepare import Filters, prepare
from rec.data.prepared import Prepared
from rec.data.raw import RawData


@pytest.fixture
def folder(tmp_path):
    """Users [a b a], [b c c c c] and [a b c], a minute apart; c has no title and b's looks like markup."""
    (tmp_path / "raw.txt").write_text("")
    rows = [("u", "aba"), ("v", "bcccc"), ("w", "abc")]
    users, items = zip(*((user, item) for user, sequence in rows for item in sequence), strict=True)
    times = pa.array([1_600_000_020 + 60 * step for step in range(len(users))], pa.int64())
    table = pa.table({"user_id": users, "item_id": items, "timestamp": times})
    described = pa.table(
        {"item_id": ["a", "b", "c"], "title": ["An A", "[bold]B[/nothing]", ""], "kind": ["", "", "x"]}
    )
    prepare("t", RawData(described, table, [tmp_path / "raw.txt"]), tmp_path / "out", Filters(k_core=0))
    return tmp_path / "out"


def test_figures_are_those_of_the_folder(folder):
    stats = data_stats.describe(Prepared.load(folder))
    assert (stats["users"], stats["items"], stats["interactions"]) == (3, 3, 11)
    assert stats["density"] == pytest.approx(11 / 9)
    assert stats["lengths"]["median"] == 3
    assert stats["lengths"]["mean"] == pytest.approx(11 / 3)
    assert stats["repeats"] == pytest.approx(4 / 11)
    assert stats["time"] == {
        "kind": "minute",
        "first": "2020-09-13 12:27:00",
        "last": "2020-09-13 12:37:00",
        "ties": 0.0,
    }
    assert stats["parts"] == {"train": 5, "valid": 3, "test": 3, "context": 0}
    assert stats["cold_targets"] == {"valid": 0, "test": 0}
    assert stats["text"]["title"] == {"filled": pytest.approx(2 / 3), "words": 1.5}
    assert stats["top_items"][0] == {"item_id": "c", "interactions": 5, "text": "x"}


def test_positions_and_ties_are_told_from_times(tmp_path):
    (tmp_path / "raw.txt").write_text("")
    times = pa.array([0, 1, 1, 0, 1, 2], pa.int64())
    table = pa.table({"user_id": list("uuuvvv"), "item_id": list("abcabc"), "timestamp": times})
    items = pa.table({"item_id": pa.array([], pa.string())})
    prepare("t", RawData(items, table, [tmp_path / "raw.txt"]), tmp_path / "out", Filters(k_core=0))
    stats = data_stats.describe(Prepared.load(tmp_path / "out"))
    assert stats["time"] == {"kind": "positions", "first": 0, "last": 2, "ties": 0.25}
    assert stats["text"] == {}
    assert stats["top_items"][0]["text"] == ""


def test_the_command_prints_and_draws(folder, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["recalign", "data", "stats", str(folder), "--out", str(tmp_path / "figures")])
    cli.main()
    printed = capsys.readouterr().out
    for expected in ("interactions", "1.5 words where filled", "[bold]B[/nothing]", "An A", "to the minute"):
        assert expected in printed
    result = json.loads((tmp_path / "figures" / "result.json").read_text())
    assert result["rows"][0]["interactions"] == 11
    assert result["command"].startswith("recalign data stats")
    picture = data_stats.plt.imread(tmp_path / "figures" / "stats.png")
    assert picture.shape[0] > 300
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 10, "the picture is not empty"


def test_a_users_mistake_is_one_line(tmp_path, monkeypatch, capsys, folder):
    (tmp_path / "file").write_text("")
    for arguments, expected in [
        ([str(tmp_path / "none")], "is no prepared folder"),
        ([str(folder), "--out", str(tmp_path / "file")], "cannot be written"),
    ]:
        monkeypatch.setattr(sys, "argv", ["recalign", "data", "stats", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        assert expected in captured.err + captured.out
        assert "Traceback" not in captured.err


def test_every_length_is_drawn(tmp_path):
    for length in (3, 14):
        folder = tmp_path / str(length)
        prepare("t", make_raw(folder / "raw", length=length), folder / "out", Filters(k_core=0))
        data_stats.draw(Prepared.load(folder / "out"), "t", folder / "x.png")
        assert (folder / "x.png").stat().st_size > 5_000
