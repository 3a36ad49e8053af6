"""Texts from a file of their own, joined to any source."""

from dataclasses import replace

import pyarrow as pa
import pytest
from pyarrow import parquet

from rec.data.item_texts import add_item_texts
from rec.data.prepare import Filters, prepare
from rec.data.raw import RawData
from rec.runtime.errors import UserError


@pytest.fixture
def raw(tmp_path) -> RawData:
    (tmp_path / "source.txt").write_text("x")
    users = [f"u{nth // 4}" for nth in range(16)]
    items = ["c", "a", "b", "d"] * 4
    return RawData(
        pa.table({"item_id": ["c", "a", "b"], "title": ["C", "A", "B"]}),
        pa.table({"user_id": users, "item_id": items, "timestamp": pa.array(range(16), pa.int64())}),
        [tmp_path / "source.txt"],
    )


def write(folder, text: str):
    path = folder / "texts.csv"
    path.write_text(text)
    return path


def test_columns_join_by_item_and_leave_order_and_own_columns_alone(raw, tmp_path):
    path = write(tmp_path, "item_id,title,story\nb,other,of b\nd,of its own,of d\nnobody,x,y\nc,,of c\n")
    joined = add_item_texts(raw, path)
    rows = joined.items.to_pylist()
    assert rows[:3] == [
        {"item_id": "c", "title": "C", "story": "of c"},
        {"item_id": "a", "title": "A", "story": ""},
        {"item_id": "b", "title": "B", "story": "of b"},
    ]
    assert joined.files == [*raw.files, path]
    prepare("test", joined, tmp_path / "out", Filters(k_core=0))
    items = parquet.read_table(tmp_path / "out" / "items.parquet").to_pylist()
    assert {row["item_id"]: row["story"] for row in items} == {"c": "of c", "a": "", "b": "of b", "d": "of d"}


@pytest.mark.parametrize("text", ["story,item_id\nof a,a\n", "title,order,item_id,story\nother,1,a,of a\n"])
def test_the_column_of_ids_may_stand_anywhere_and_others_have_any_name(raw, tmp_path, text):
    joined = add_item_texts(raw, write(tmp_path, text)).items.to_pylist()
    assert [(row["item_id"], row["title"], row["story"]) for row in joined] == [
        ("c", "C", ""), ("a", "A", "of a"), ("b", "B", ""),
    ]  # fmt: skip
    assert [row.get("order") for row in joined] == (["", "1", ""] if "order" in text else [None] * 3)


def test_another_file_is_another_prepared_folder(raw, tmp_path):
    path = write(tmp_path, "item_id,story\na,once\n")
    prepare("test", add_item_texts(raw, path), tmp_path / "out", Filters(k_core=0))
    path.write_text("item_id,story\na,twice\n")
    with pytest.raises(UserError, match="holds other prepared data"):
        prepare("test", add_item_texts(raw, path), tmp_path / "out", Filters(k_core=0))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("item_id,story\na,x\na,y\n", "'a' occurs twice"),
        ("item_id,story\nz,x\n", "names no item of the interactions"),
        ("movie,story\na,x\n", "no column 'item_id'"),
        ("", "texts.csv"),
    ],
)
def test_a_wrong_file_is_one_clear_line(raw, tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        add_item_texts(raw, write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_clear_line(raw, tmp_path):
    with pytest.raises(UserError, match="item texts not found"):
        add_item_texts(raw, tmp_path / "none.csv")


def test_an_item_that_the_source_describes_twice_is_a_mistake_in_the_sources_file(raw, tmp_path):
    twice = replace(raw, items=pa.table({"item_id": ["c", "a", "c"], "title": ["C", "A", "B"]}))
    path = write(tmp_path, "item_id,story\na,x\n")
    with pytest.raises(UserError, match=r"source.txt, data row 3: item_id 'c' occurs twice"):
        add_item_texts(twice, path)
