"""The prepared folder: filters, numbering, counts, and that nothing half-written is ever seen."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from worlds import make_raw

from rec.data import readers
from rec.data.prepare import META, Filters, prepare
from rec.data.prepared import Prepared
from rec.data.raw import RawData
from rec.data.readers import closed_world
from rec.runtime import files
from rec.runtime.errors import UserError

LOOSE = Filters(k_core=0)
Rows = list[tuple[str, str, int]]


def raw_of(folder: Path, rows: Rows, items: list[str], dropped: dict[str, int] | None = None) -> RawData:
    (folder / "raw.txt").write_text(repr((rows, items)))
    users, ids, times = zip(*rows, strict=True)
    table = pa.table({"user_id": users, "item_id": ids, "timestamp": pa.array(times, pa.int64())})
    titles = pa.table({"item_id": items, "title": [f"the {item}" for item in items]})
    return RawData(titles, table, [folder / "raw.txt"], dropped or {})


def random_rows(seed: int, n: int = 300) -> Rows:
    rng = np.random.default_rng(seed)
    users, items = rng.zipf(1.4, n) % 40, rng.zipf(1.3, n) % 50
    times = rng.integers(30, size=n)  # many ties
    return [(f"u{u}", f"i{i}", int(t)) for u, i, t in zip(users, items, times, strict=True)]


def kept_rows(folder: Path) -> Rows:
    """What a prepared folder holds, in its order and under the original names."""
    table = parquet.read_table(folder / "interactions.parquet")
    users = parquet.read_table(folder / "users.parquet")["user_id"].to_pylist()
    items = parquet.read_table(folder / "items.parquet")["item_id"].to_pylist()
    return [(users[row["user"]], items[row["item"] - 1], row["timestamp"]) for row in table.to_pylist()]


def naive_core(rows: Rows, k: int) -> Rows:
    while True:
        users, items = [row[0] for row in rows], [row[1] for row in rows]
        kept = [row for row in rows if users.count(row[0]) >= k and items.count(row[1]) >= k]
        if kept == rows:
            return rows
        rows = kept


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [2, 3, 5])
def test_k_core_is_iterated_to_its_end(tmp_path, seed, k):
    rows = random_rows(seed)
    expected = naive_core(rows, k)
    meta = prepare("t", raw_of(tmp_path, rows, []), tmp_path / "out", Filters(k_core=k))
    long_enough = [row for row in expected if [other[0] for other in expected].count(row[0]) >= 3]
    assert sorted(kept_rows(tmp_path / "out")) == sorted(long_enough)
    assert meta["counts"]["left_out"] == {
        "k_core": len(rows) - len(expected),
        "min_length": len(expected) - len(long_enough),
    }


def test_min_length_drops_short_users(tmp_path):
    rows = [("short", "a", 1), ("short", "b", 2), ("short", "c", 3), *(("long", item, 1) for item in "abcd")]
    meta = prepare("t", raw_of(tmp_path, rows, list("abcd")), tmp_path / "out", Filters(k_core=0, min_length=4))
    assert {row[0] for row in kept_rows(tmp_path / "out")} == {"long"}
    assert meta["counts"]["left_out"]["min_length"] == 3


def test_repeats_dropped_are_the_later_ones_in_time(tmp_path):
    rows = [("u", "a", 9), ("u", "b", 2), ("u", "a", 1), ("u", "c", 5), ("u", "b", 2), ("v", "a", 7)]
    rows += [("v", "b", 8), ("v", "c", 9)]
    raw = raw_of(tmp_path, rows, list("abc"))
    kept = prepare("t", raw, tmp_path / "keep", LOOSE)["counts"]
    dropped = prepare("t", raw, tmp_path / "drop", Filters(k_core=0, repeats="drop"))["counts"]
    assert (kept["interactions"], dropped["interactions"]) == (8, 6)
    assert "repeats" not in kept["left_out"]
    assert dropped["left_out"]["repeats"] == 2
    assert kept_rows(tmp_path / "drop")[:3] == [("u", "a", 1), ("u", "b", 2), ("u", "c", 5)]


@pytest.mark.parametrize("repeats", ["keep", "drop"])
def test_counts_add_up_to_what_was_read(tmp_path, repeats):
    rows = random_rows(9)
    raw = raw_of(tmp_path, rows, [], {"cancellation": 5, "no_customer": 7})
    meta = prepare("t", raw, tmp_path / "out", Filters(k_core=3, min_length=6, repeats=repeats))
    counts = meta["counts"]
    assert counts["read"] == len(rows) + 12
    assert counts["read"] == sum(counts["left_out"].values()) + counts["interactions"]
    assert counts["left_out"]["cancellation"] == 5
    held = kept_rows(tmp_path / "out")
    assert counts["interactions"] == len(held)
    assert counts["users"] == len({row[0] for row in held})
    assert counts["items"] == len({row[1] for row in held})
    assert meta == files.read_json(tmp_path / "out" / META)


def test_numbers_follow_item_table_and_first_appearance(tmp_path):
    rows = [("late", "c", 50), ("early", "b", 1), ("early", "c", 2), ("late", "a", 3), ("late", "b", 4)]
    rows += [("early", "a", 9), ("gone", "x", 1)]
    prepare("t", raw_of(tmp_path, rows, ["b", "unused", "x", "c", "a"]), tmp_path / "out", LOOSE)
    assert parquet.read_table(tmp_path / "out" / "users.parquet")["user_id"].to_pylist() == ["late", "early"]
    items = parquet.read_table(tmp_path / "out" / "items.parquet")
    assert items.to_pydict() == {"item_id": ["b", "c", "a"], "title": ["the b", "the c", "the a"]}
    interactions = parquet.read_table(tmp_path / "out" / "interactions.parquet")
    assert interactions["item"].to_pylist() == [3, 1, 2, 1, 2, 3]
    assert interactions["user"].to_pylist() == [0, 0, 0, 1, 1, 1]


def test_ties_of_time_keep_source_order(tmp_path):
    rows = random_rows(3)
    prepare("t", raw_of(tmp_path, rows, []), tmp_path / "out", Filters(k_core=2))
    core = naive_core(rows, 2)
    core = [row for row in core if [other[0] for other in core].count(row[0]) >= 3]
    appearance = list(dict.fromkeys(row[0] for row in rows))
    # Python's sort is stable.
    assert kept_rows(tmp_path / "out") == sorted(core, key=lambda row: (appearance.index(row[0]), row[2]))


def test_times_that_float32_cannot_tell_apart_keep_their_order(tmp_path):
    order = np.random.default_rng(0).permutation(60).tolist()
    rows = [("u", f"i{step}", 1_600_000_000 + step) for step in order]
    prepare("t", raw_of(tmp_path, rows, []), tmp_path / "out", LOOSE)
    assert [row[1] for row in kept_rows(tmp_path / "out")] == [f"i{step}" for step in range(60)]


def test_undescribed_items_stay_with_empty_text(tmp_path):
    rows = [("u", item, 1) for item in ("z", "b", "y", "a")]
    meta = prepare("t", raw_of(tmp_path, rows, ["b", "a"]), tmp_path / "out", LOOSE)
    items = parquet.read_table(tmp_path / "out" / "items.parquet").to_pydict()
    assert items == {"item_id": ["b", "a", "y", "z"], "title": ["the b", "the a", "", ""]}
    assert meta["counts"]["items_without_text"] == 2


def test_same_input_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        prepare("t", make_raw(tmp_path / "raw"), tmp_path / name, Filters())
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")
    assert len(bytes_of(tmp_path / "one")) == 4


def test_second_call_does_nothing(tmp_path):
    raw = make_raw(tmp_path / "raw")
    meta = prepare("t", raw, tmp_path / "out", Filters())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare("t", raw, tmp_path / "out", Filters()) == meta
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_data_is_never_overwritten(tmp_path):
    raw, out = make_raw(tmp_path / "raw"), tmp_path / "out"
    prepare("t", raw, out, Filters())
    before = bytes_of(out)
    for source, other, filters in [
        ("t", raw, Filters(k_core=3)),
        ("other", raw, Filters()),
        ("t", make_raw(tmp_path / "raw2", seed=1), Filters()),
        ("t", RawData(raw.items, raw.interactions, raw.files, options={"users": "invoices"}), Filters()),
    ]:
        with pytest.raises(UserError, match="holds other prepared data"):
            prepare(source, other, out, filters)
    assert bytes_of(out) == before


def test_retail_customers_and_invoices_are_different_data(tmp_path):
    header = "InvoiceNo,StockCode,Description,InvoiceDate,CustomerID\n"
    lines = [f"{9 - row // 3},{11111 + row % 3},CUP,2010-12-01 08:2{row}:00,7\n" for row in range(9)]
    (tmp_path / "online_retail.csv").write_text(header + "".join(lines))
    customers, invoices = (readers.read("online-retail", tmp_path, users=users) for users in ("customers", "invoices"))
    assert prepare("online-retail", customers, tmp_path / "out", LOOSE)["counts"]["users"] == 1
    with pytest.raises(UserError, match="holds other prepared data"):
        prepare("online-retail", invoices, tmp_path / "out", LOOSE)
    assert prepare("online-retail", invoices, tmp_path / "invoices", LOOSE)["counts"]["users"] == 3
    with pytest.raises(UserError, match="holds other prepared data"):
        prepare("online-retail", customers, tmp_path / "invoices", LOOSE)


def test_out_that_holds_something_else_is_left_alone(tmp_path):
    raw = make_raw(tmp_path / "raw")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "thesis", tmp_path / "file"):
        with pytest.raises(UserError, match="exists and is no prepared folder"):
            prepare("t", raw, out, Filters())
    with pytest.raises(UserError, match="cannot be written"):
        prepare("t", raw, tmp_path / "file" / "out", Filters())
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"raw", "thesis", "file"}


@pytest.mark.parametrize("content", ["{half", "[]"])
def test_out_with_a_broken_meta_is_one_line(tmp_path, content):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / META).write_text(content)
    with pytest.raises(UserError, match=r"cannot be read|holds other"):
        prepare("t", make_raw(tmp_path / "raw"), tmp_path / "out", Filters())
    assert (tmp_path / "out" / META).read_text() == content


def test_an_empty_out_is_filled(tmp_path):
    (tmp_path / "deep" / "out").mkdir(parents=True)
    prepare("t", make_raw(tmp_path / "raw"), tmp_path / "deep" / "out", Filters())
    assert (tmp_path / "deep" / "out" / META).is_file()


@pytest.mark.parametrize("broken", ["parquet.write_table", "files.write_json", "files.publish_folder"])
def test_a_kill_while_writing_leaves_no_visible_folder(tmp_path, monkeypatch, broken):
    raw, out = make_raw(tmp_path / "raw"), tmp_path / "out" / "ml"
    module, name = broken.split(".")
    whole, calls = getattr({"parquet": parquet, "files": files}[module], name), []

    def killed(*args, **kwargs):
        calls.append(args)
        if name == "write_table" and len(calls) == 1:
            return whole(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(f"rec.data.prepare.{broken}", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare("t", raw, out, Filters())
    assert all(path.name.startswith(".") for path in out.parent.iterdir())
    monkeypatch.undo()
    prepare("t", raw, out, Filters())
    assert [path.name for path in out.parent.iterdir()] == ["ml"]
    assert Prepared.load(out).n_users == 40


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rec.data.prepare.parquet.write_table", full)
    with pytest.raises(UserError, match=r"out cannot be written: .*No space left on device"):
        prepare("t", make_raw(tmp_path / "raw"), tmp_path / "out", Filters())
    assert not (tmp_path / "out").exists()


def test_duplicate_item_is_named_with_its_row(tmp_path):
    raw = raw_of(tmp_path, [("u", "a", 1)] * 3, ["a", "b", "b", "a"])
    with pytest.raises(UserError, match=r"raw\.txt, data row 3: item_id 'b' occurs twice"):
        prepare("t", raw, tmp_path / "out", LOOSE)


def test_nothing_left_of_data_without_files_names_the_source(tmp_path):
    with pytest.raises(UserError, match="no interaction of closed-world is left after filtering"):
        prepare("closed-world", closed_world.read(world_seed=0), tmp_path / "out", Filters(k_core=500))


def test_nothing_left_says_what_was_left_out(tmp_path):
    rows = [("u", "a", 1), ("u", "a", 2), ("u", "b", 3), ("v", "b", 3)]
    raw = raw_of(tmp_path, rows, ["a", "b"], {"no_customer": 4})
    with pytest.raises(UserError) as caught:
        prepare("t", raw, tmp_path / "out", Filters(k_core=3, repeats="drop"))
    assert str(caught.value) == (
        f"no interaction of {tmp_path / 'raw.txt'} is left after filtering"
        " (read 8, left out: no customer 4, repeats 1, k core 3); lower k_core or check the file"
    )
    assert not (tmp_path / "out").exists()


def test_a_reader_that_leaves_out_every_row_is_one_line(tmp_path):
    header = "InvoiceNo,StockCode,Description,InvoiceDate,CustomerID\n"
    (tmp_path / "online_retail.csv").write_text(header + "1,POST,POSTAGE,2010-12-01 08:26:00,7\n")
    with pytest.raises(UserError, match="read 1, left out: code is no product 1"):
        prepare("online-retail", readers.read("online-retail", tmp_path), tmp_path / "out", LOOSE)


def test_a_nameless_product_is_named_by_its_row_in_the_file(tmp_path):
    header = "InvoiceNo,StockCode,Description,InvoiceDate,CustomerID\n"
    rows = "C1,84029,LAMP,2010-12-01 08:26:00,7\n2,,LAMP,2010-12-01 08:26:00,7\n"
    (tmp_path / "online_retail.csv").write_text(header + rows)
    with pytest.raises(UserError, match="data row 2: StockCode is empty"):
        readers.read("online-retail", tmp_path, rows="all")


def test_meta_says_where_the_data_came_from(tmp_path):
    prepare("t", make_raw(tmp_path / "raw"), tmp_path / "out", Filters())
    meta = json.loads((tmp_path / "out" / META).read_text())
    assert meta["source"] == "t"
    assert meta["filters"] == Filters().model_dump()
    assert meta["filters"]["split"] == "leave-one-out"
    assert meta["schema_version"] == 2
    assert len(meta["raw_sha256"]) == len(meta["content_hash"]) == 16


@pytest.mark.parametrize("source", ["csv numbers", "csv dates", "parquet", "amazon"])
def test_parts_of_a_second_order_a_history_and_seconds_are_kept(tmp_path, source):
    """Two users, whose rows stand in another order than their times within one second."""
    rows = [("u1", "c", 700), ("u1", "a", 5), ("u2", "b", 9), ("u1", "b", 70), ("u2", "a", 8), ("u2", "c", 10)]
    users, items, parts = (list(column) for column in zip(*rows, strict=True))
    raw, name = tmp_path / "raw", "table"
    raw.mkdir()
    if source == "parquet":
        times = pa.array([5_000_000 + part for part in parts], pa.timestamp("us"))
        parquet.write_table(
            pa.table({"user_id": users, "item_id": items, "timestamp": times}), raw / "interactions.parquet"
        )
    elif source == "amazon":
        name = "amazon"
        lines = [{"user_id": user, "parent_asin": item, "timestamp": 5000 + part, "rating": 5.0}
                 for user, item, part in rows]  # fmt: skip
        (raw / "Toys.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        form = "5.{:03d}" if source == "csv numbers" else "1970-01-01 00:00:05.{:03d}"
        lines = [f"{user},{item},{form.format(part)}" for user, item, part in rows]
        (raw / "interactions.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    prepare(name, readers.read(name, raw), tmp_path / "out", LOOSE)
    assert kept_rows(tmp_path / "out") == [
        ("u1", "a", 5), ("u1", "b", 5), ("u1", "c", 5), ("u2", "a", 5), ("u2", "b", 5), ("u2", "c", 5),
    ]  # fmt: skip
