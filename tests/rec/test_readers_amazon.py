"""Amazon reviews of three generations, and the Yelp data: JSON lines as they come."""

import gzip
import json

import pytest
from raw_files import message_of, rows_of, write_files

from rec.data import readers
from rec.data.prepare import Filters, prepare

META_2014 = (
    "{'asin': '001', 'title': 'Kid\\'s \"Art\" &amp; Craft', 'brand': 'Acme', 'price': 3.5,"
    " 'categories': [['Toys', 'Arts &amp; Crafts'], ['Home']], 'salesRank': {'Toys': 1}}\n"
    "{'asin': '002', 'description': 'Only \\d a <b>description</b>', 'categories': [['Toys']]}\n"
)


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def review_2018(user="A", item="001", time=1_400_000_000, stars=5.0, **more) -> dict:
    return {"overall": stars, "reviewerID": user, "asin": item, "reviewText": "x", "unixReviewTime": time, **more}


def review_2023(user="A", item="P1", time=1_588_687_728_923, stars=5.0) -> dict:
    return {"rating": stars, "title": "t", "images": [], "asin": "V1", "parent_asin": item, "user_id": user,
            "timestamp": time, "verified_purchase": True}  # fmt: skip


def test_2014_metadata_is_python_and_never_run(tmp_path):
    write_files(tmp_path, reviews_Toys_5__json=lines(review_2018(), review_2018("B", "002", 5)))
    write_files(tmp_path, meta_Toys__json=META_2014)
    raw = readers.read("amazon", tmp_path)
    assert rows_of(raw) == [("A", "001", 1_400_000_000), ("B", "002", 5)]
    first, second = raw.items.to_pylist()
    assert (first["title"], first["brand"]) == ('Kid\'s "Art" & Craft', "Acme")
    assert first["category"] == "Toys > Arts & Crafts"
    assert second["description"] == r"Only \d a description"
    assert second["title"] == second["brand"] == ""
    marker = tmp_path / "run"
    write_files(tmp_path, meta_Toys__json=f"{{'asin': open({str(marker)!r}, 'w')}}\n")
    assert "meta_Toys.json, line 1: not a JSON object or Python dict" in message_of("amazon", tmp_path)
    assert not marker.exists()


def test_2018_lists_markup_scripts_and_repeated_rows(tmp_path):
    items = [
        {"asin": "001", "title": "<span class=\"a\"", "brand": "", "category": ["A &amp; B", "C"],
         "feature": ["one", "", "t<br>wo"], "description": ["p", ["q", ["r"]], 3]},
        {"asin": "001", "title": "I &lt;3 <i>you</i>\n again", "brand": "late", "description": "not taken"},
        {"asin": "002", "title": "var aPageStart = (new Date()).getTime();"},
        {"asin": "009", "title": "nobody reviewed it"},
    ]  # fmt: skip
    contents = {"Toys_5.json.gz": lines(review_2018(), review_2018(item="002")), "meta_Toys.json.gz": lines(*items)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    raw = readers.read("amazon", tmp_path)
    assert raw.items.to_pylist() == [
        {"item_id": "001", "title": "I <3 you again", "brand": "late", "category": "A & B > C",
         "features": "one t wo", "description": "p q r 3"},
        {"item_id": "002", "title": "", "brand": "", "category": "", "features": "", "description": ""},
    ]  # fmt: skip
    assert raw.item_rows == {"repeated": 1, "title_is_a_script": 1, "not_reviewed": 1}
    counts = prepare("amazon", raw, tmp_path / "out", Filters(k_core=0, min_length=1, split="ratio", valid_fraction=0))[
        "counts"
    ]
    assert counts["item_rows"] == raw.item_rows
    assert counts["items_without_text"] == 1


def test_2023_parents_stores_and_milliseconds(tmp_path):
    item = {"parent_asin": "P1", "title": "T", "store": "S", "main_category": "M", "categories": [], "features": ["f"],
            "description": []}  # fmt: skip
    write_files(tmp_path, Toys__jsonl=lines(review_2023(), review_2023("B", time=999)), meta_Toys__jsonl=lines(item))
    raw = readers.read("amazon", tmp_path / "Toys.jsonl")
    assert rows_of(raw) == [("A", "P1", 1_588_687_728), ("B", "P1", 0)]
    assert raw.items.to_pylist() == [
        {"item_id": "P1", "title": "T", "brand": "S", "category": "M", "features": "f", "description": ""}
    ]


def test_few_stars_are_left_out_and_counted(tmp_path):
    rows = [review_2018(stars=stars, time=time) for time, stars in enumerate([1.0, 3, 2.5, 5])]
    write_files(tmp_path, Toys_5__json=lines(*rows))
    raw = readers.read("amazon", tmp_path, min_rating=3.0)
    assert [row[2] for row in rows_of(raw)] == [1, 3]
    assert raw.dropped == {"rating_too_low": 2}
    assert raw.options == {"min_rating": "3.0"}


def test_unusual_values_take_the_slow_way_to_the_same_result(tmp_path):
    usual = [review_2018(str(user), str(user % 3), 10 + user) for user in range(20)]
    unusual = [dict(row) for row in usual]
    unusual[7]["reviewerID"], unusual[8]["asin"] = 7, 2
    unusual[9]["unixReviewTime"], unusual[10]["unixReviewTime"] = "19", 20.9
    for name, rows in (("usual", usual), ("unusual", unusual)):
        write_files(tmp_path / name, Toys__json="\n\n" + lines(*rows).replace("\n", "\r\n\n"))
    assert rows_of(readers.read("amazon", tmp_path / "usual")) == rows_of(readers.read("amazon", tmp_path / "unusual"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"reviewerID": None}, "line 3: reviewerID is missing"),
        ({"asin": ["001"]}, "line 3: asin is \"['001']\", not an id"),
        ({"asin": 1.5}, "line 3: asin is '1.5', not an id"),
        ({"reviewerID": True}, "line 3: reviewerID is 'True', not an id"),
        ({"unixReviewTime": "May"}, "line 3: unixReviewTime is 'May', not a time"),
        ({"unixReviewTime": float("nan")}, "line 3: unixReviewTime is 'nan', not a time"),
        ({"unixReviewTime": float("inf")}, "line 3: unixReviewTime is 'inf', not a time"),
        ({"unixReviewTime": 10**30}, "line 3: unixReviewTime is '1000000"),
        ({"unixReviewTime": False}, "line 3: unixReviewTime is 'False', not a time"),
        ({"overall": {}}, "line 3: overall is '{}', not a number"),
        ({"reviewerID": ""}, "data row 2: reviewerID is empty"),
    ],
    ids=str,
)
def test_bad_reviews_name_their_line(tmp_path, change, expected):
    write_files(tmp_path, Toys__json=lines(review_2018()) + "\n" + lines(review_2018(**change)))
    message = message_of("amazon", tmp_path, min_rating=1.0)
    assert f"Toys.json, {expected}" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (lines(review_2018()) + '{"half": ', "line 2: not a JSON object (Expecting value at character 10)"),
        (lines(review_2018()) + "[1]\n", "line 2: not a JSON object but '[1]'"),
        (lines(review_2018()).strip() * 2, "line 1: not a JSON object (Extra data"),
        (lines({"stars": 1}), "holds no Amazon reviews: line 1 has neither reviewerID nor user_id, it has 'stars'"),
        (lines(review_2018()) + "[" * 100_000, "line 2: brackets are nested too deeply"),
        ("", "Toys.json is empty"),
        (b'{"reviewerID": "\xff"}\n', "line 1: not utf-8 text (byte 0xff)"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_broken_json_is_one_line(tmp_path, text, expected):
    assert expected in message_of("amazon", write_files(tmp_path, Toys__json=text))


def test_folders_without_or_with_several_reviews(tmp_path):
    assert "holds 0 files of reviews (.json, .jsonl); name one" in message_of("amazon", tmp_path)
    write_files(tmp_path, A_5__json="", B_5__json="")
    assert "holds 2 files of reviews (.json, .jsonl): A_5.json, B_5.json; name one" in message_of("amazon", tmp_path)
    assert message_of("amazon", tmp_path / "none") == f"raw data not found: {tmp_path / 'none'}"


def test_lone_surrogates_do_not_stop_anything(tmp_path):
    write_files(tmp_path, Toys__json='{"reviewerID": "a\\ud83d", "asin": "1", "unixReviewTime": 3}\n')
    write_files(tmp_path, meta_Toys__json='{"asin": "1", "title": "x\\udc00y"}\n')
    raw = readers.read("amazon", tmp_path)
    assert rows_of(raw) == [("a?", "1", 3)]
    assert raw.items["title"].to_pylist() == ["x?y"]


def yelp_review(user="u", item="b1", date="2018-07-07 22:09:11", stars=4.0) -> dict:
    return {"review_id": "r", "user_id": user, "business_id": item, "stars": stars, "date": date, "text": "t"}


def test_yelp(tmp_path):
    businesses = [
        {"business_id": "b1", "name": "Café", "categories": "Food, Coffee", "city": "X", "state": "AZ", "hours": None},
        {"business_id": "b2", "name": "Bar", "categories": ["Nightlife", "Bars"], "city": None},
        {"business_id": "b1", "name": "again"},
    ]
    reviews = [yelp_review(), yelp_review("v", "b2", "2016-03-09"), yelp_review("v", "b3", stars=1)]
    write_files(tmp_path, yelp_academic_dataset_review__json=lines(*reviews))
    write_files(tmp_path, yelp_academic_dataset_business__json=lines(*businesses))
    raw = readers.read("yelp", tmp_path)
    assert rows_of(raw) == [("u", "b1", 1_531_001_351), ("v", "b2", 1_457_481_600), ("v", "b3", 1_531_001_351)]
    assert raw.items.to_pylist() == [
        {"item_id": "b1", "name": "Café", "categories": "Food, Coffee", "city": "X", "state": "AZ"},
        {"item_id": "b2", "name": "Bar", "categories": "Nightlife, Bars", "city": "", "state": ""},
    ]
    assert raw.item_rows == {"repeated": 1}
    assert len(readers.read("yelp", tmp_path, min_rating=2).interactions) == 2
    write_files(tmp_path, yelp_academic_dataset_review__json=lines(yelp_review(), yelp_review(date="yesterday")))
    assert "data row 2: date is 'yesterday', not a date like 2016-03-09" in message_of("yelp", tmp_path)
    write_files(tmp_path, yelp_academic_dataset_business__json=lines({"business_id": 4}))
    write_files(tmp_path, yelp_academic_dataset_review__json=lines(yelp_review()))
    assert "business.json, line 1: business_id is '4', not an id" in message_of("yelp", tmp_path)
