"""Real data: every count that a paper or the source itself states."""

import importlib.util
from pathlib import Path

import pytest
from raw_files import message_of, shared

from rec.data import builtin, readers
from rec.data.prepare import Filters, prepare

ALL = Filters(k_core=0, min_length=1, split="users")


def counts_of(source: str, raw_path: Path, out: Path, filters: Filters = ALL, **options) -> dict:
    """What a prepared folder counts, after checking that every row read is either kept or counted."""
    counts = prepare(source, readers.read(source, raw_path, **options), out, filters)["counts"]
    assert counts["read"] == sum(counts["left_out"].values()) + counts["interactions"]
    return counts


def sizes(counts: dict) -> tuple[int, int, int]:
    return counts["users"], counts["items"], counts["interactions"]


@pytest.mark.parametrize(
    ("source", "name", "expected"),
    [
        ("movielens", "ml-1m", (2_999, 3_615, 487_650)),
        ("movielens", "ml-100k", (943, 1_682, 100_000)),
        ("table", "amazon-beauty-2014", (22_363, 12_101, 198_502)),
        ("table", "amazon-toys-2014", (19_412, 11_924, 167_597)),
        ("table", "amazon-scientific-2018", (3_285, 3_541, 22_743)),
        ("table", "amazon-office-2018", (3_231, 3_317, 22_447)),
        ("amazon", "amazon-2018-raw/Gift_Cards_5.json.gz", (458, 148, 2_972)),
        ("amazon", "amazon-2018-raw/Magazine_Subscriptions_5.json.gz", (348, 157, 2_375)),
    ],
)
def test_every_row_of_a_source_is_there(tmp_path, source, name, expected):
    path = shared(name.split("/")[0]) / "/".join(name.split("/")[1:])
    counts = counts_of(source, path, tmp_path / "out")
    assert sizes(counts) == expected
    assert counts["left_out"] == {"k_core": 0, "min_length": 0}


@pytest.mark.parametrize("name", ["amazon-beauty-2014", "amazon-toys-2014"])
def test_a_5_core_loses_nothing_to_the_5_core_filter(tmp_path, name):
    counts = counts_of("table", shared(name), tmp_path / "out", Filters())
    assert set(counts["left_out"].values()) == {0}
    assert counts["items_without_text"] == 0


def test_online_retail_customers_without_filters(tmp_path):
    counts = counts_of("online-retail", shared("online-retail"), tmp_path / "out", rows="all")
    assert sizes(counts) == (4_339, 3_665, 397_924)
    assert counts["left_out"]["cancellation"] == 9_288


def test_online_retail_customers_and_products(tmp_path):
    counts = counts_of("online-retail", shared("online-retail"), tmp_path / "out", Filters())
    assert counts["read"] == 541_909
    assert sizes(counts) == (4_105, 3_186, 394_810)
    assert counts["items_without_text"] == 0


def test_online_retail_invoices_are_table_3_of_lmrec(tmp_path):
    path = shared("online-retail")
    counts = counts_of("online-retail", path, tmp_path / "out", Filters(), rows="lmrec", users="invoices")
    assert sizes(counts) == (16_520, 3_469, 519_906)
    assert counts["left_out"]["repeated_line"] == 5_429


def test_amazon_2018_titles_are_text():
    raw = readers.read("amazon", shared("amazon-2018-raw") / "Magazine_Subscriptions_5.json.gz")
    assert raw.item_rows["repeated"] == 98
    assert not [title for title in raw.items["title"].to_pylist() if "<" in title or "&amp;" in title]
    cards = readers.read("amazon", shared("amazon-2018-raw") / "Gift_Cards_5.json.gz")
    assert all(cards.items["title"].to_pylist())
    assert cards.items["category"][0].as_py() == "Gift Cards > Gift Cards"


def test_two_categories_in_one_folder_ask_for_one():
    message = message_of("amazon", shared("amazon-2018-raw"))
    assert "holds 2 files of reviews" in message
    assert "Gift_Cards_5.json.gz, Magazine_Subscriptions_5.json.gz; name one with --raw" in message


def test_movielens_texts():
    raw = readers.read("movielens", shared("ml-100k"))
    assert raw.items["title"][0].as_py() == "Toy Story"
    raw = readers.read("movielens", shared("ml-1m"))
    assert len(raw.items) == 3_883
    assert all(raw.items["year"].to_pylist()), "every title ends in its year"


def test_movielens_100k_is_the_same_from_both_its_sources(tmp_path):
    if importlib.util.find_spec("recbole") is None:
        pytest.skip("the recbole wheel is not installed")
    counts_of("movielens", shared("ml-100k"), tmp_path / "a")
    prepare("recbole", builtin.ml_100k(), tmp_path / "b", ALL)
    for name in ("interactions.parquet", "users.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
