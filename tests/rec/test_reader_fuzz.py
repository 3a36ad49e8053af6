"""Broken files of every source: each ends in success or in one clear line, soon, and never in a traceback."""

import codecs
import csv
import gzip
import io
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import openpyxl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from rec.data import readers
from rec.data.prepare import Filters, prepare
from rec.runtime.errors import UserError

SLOWEST = 10.0  # seconds; a usual one takes milliseconds

RETAIL = (
    "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country\n"
    '1,85123A,"LAMP, ""RED""",6,2010-12-01 08:26:00,2.55,17850.0,UK\nC2,POST,,-1,2010-12-01 08:27:00,1,,UK\n'
)
REVIEW = '{"reviewerID": "A", "asin": "1", "overall": 5.0, "unixReviewTime": 1400000000, "reviewText": "é"}\n'
REVIEW_2023 = '{"user_id": "A", "parent_asin": "1", "rating": 5.0, "timestamp": 1400000000000, "text": "é"}\n'
META = '{"asin": "1", "title": "T &amp; <b>x</b>", "category": [["a"], "b"], "description": ["d"]}\n'
META_2014 = "{'asin': '1', 'title': 'T', 'categories': [['a', 'b']]}\n"
YELP = '{"user_id": "u", "business_id": "b", "stars": 4.0, "date": "2018-07-07 22:09:11"}\n'
FLAGS = "|0" * 18


def packed_parquet(**columns: list) -> bytes:
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def workbook() -> bytes:
    """A sheet; its cells stand compressed in the file, so faults hit the archive, deflate streams and XML alike."""
    book, buffer = openpyxl.Workbook(), io.BytesIO()
    for row in csv.reader(RETAIL.splitlines()):
        book.active.append(row)
    book.save(buffer)
    return buffer.getvalue()


# Whole sources, as {file name: bytes}.
WHOLE: dict[str, tuple[str, dict[str, bytes]]] = {
    "table csv": ("table", {
        "interactions.csv": "user_id,item_id,timestamp\nu,a,1\nu,\"b\",2.5\nv,é,2010\n".encode(),
        "items.csv": 'item_id,title\na,"A, ""the"" é"\nb,"two\nlines"\n'.encode(),
    }),
    "table gz": ("table", {
        "interactions.csv.gz": gzip.compress(b"user_id,item_id,timestamp\n" + b"u,a,2010-12-01\n" * 2, mtime=0),
        "items.csv": b"item_id,title\na,A\n",
    }),
    "table parquet": ("table", {
        "interactions.parquet": packed_parquet(user_id=[1, 2], item_id=["a", "b"], timestamp=[1.5, 2.0]),
        "items.parquet": packed_parquet(item_id=["a", "b"], title=["A", None]),
    }),
    "recbole": ("recbole", {
        "x.inter": "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\nu\té\t8.5e8\n".encode(),
        "x.item": b"item_id:token\ttitle:token_seq\na\tA \"b\n",
    }),
    "movielens 100k": ("movielens", {
        "u.data": b"196\t1\t3\t881250949\n186\t2\t3\t891717742\n",
        "u.item": f"1|Mis\xe9rables (1995)|01-Jan-1995||u{FLAGS}|1\n".encode("latin-1"),
    }),
    "movielens 1m": ("movielens", {
        "ratings.dat": b"1::1193::5::978300760\n1::661::3::978302109\n",
        "movies.dat": "1193::Caf\xe9 (1995)::Drama|War\n".encode("latin-1"),
    }),
    "movielens csv": ("movielens", {
        "ratings.csv": b"userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n",
        "movies.csv": b'movieId,title,genres\n296,"Fiction, Pulp (1994)",Comedy|Crime\n',
    }),
    "online-retail": ("online-retail", {"online_retail.csv": RETAIL.encode()}),
    "online-retail xlsx": ("online-retail", {"Online Retail.xlsx": workbook()}),
    "amazon 2018": ("amazon", {"X_5.json": REVIEW.encode() * 2, "meta_X.json": META.encode() * 2}),
    "amazon 2014": ("amazon", {
        "reviews_X.json.gz": gzip.compress(REVIEW.encode() * 2, mtime=0),
        "meta_X.json": META_2014.encode() * 2,
    }),
    "amazon 2023": ("amazon", {"X.jsonl": REVIEW_2023.encode() * 2, "meta_X.jsonl": META.encode()}),
    "yelp": ("yelp", {
        "review.json": YELP.encode() * 2,
        "business.json": b'{"business_id": "b", "name": "B", "categories": "x, y"}\n',
    }),
    "sequences": ("sequences", {"x.txt": "u a b é\nv a\n".encode(), "items.csv": b"item_id,title\na,A\n"}),
}  # fmt: skip
POISON = [
    b"", b"\0", b'"', b'""', b"\n", b"\r", b"\r\n", b",", b"\t", b"::", b":", b"|", b" ", b"{", b"}", b"[", b"]", b"'",
    b"\\", b"\\ud800", b"\xff", b"\xc3", b"\xef\xbb\xbf", b"\xff\xfe", b"\xe2\x80\xa8", b"nan", b"-inf", b"1e999",
    b"null", b"None", b"NaN", b"true", b"-1", b"9223372036854775808", b"99999999999999999999999999", b"0x10", b"1_0",
    b"2010-13-45", b"item_id", b"user_id", b"<", b"[" * 3000, b"(" * 3000, b'{"a":' * 2000, b"9" * 5000, b"x" * 70_000,
]  # fmt: skip
OPTIONS: dict[str, list[dict]] = {
    "online-retail": [{}, {"rows": "lmrec", "users": "invoices"}, {"rows": "all"}],
    "amazon": [{}, {"min_rating": 3.0}],
    "movielens": [{}, {"min_rating": 3.0}],
    "yelp": [{}, {"min_rating": 3.0}],
}
outcomes: Counter[tuple[str, bool]] = Counter()


def _unpacked(data: bytes) -> bytes | None:
    """What is in a gzip, or None if an earlier fault broke it."""
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error):
        return None


@st.composite
def broken(draw: st.DrawFn, kind: str) -> tuple[dict[str, bytes], dict]:
    """A source of this kind with one to three faults, and options to read it with."""
    source, contents = WHOLE[kind]
    contents = dict(contents)
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from(sorted(contents)))
        data = contents[name]
        inside = _unpacked(data) if name.endswith(".gz") and draw(st.booleans()) else None
        data = data if inside is None else inside
        begin = draw(st.integers(0, len(data)))
        end = min(len(data), begin + draw(st.sampled_from([0, 0, 1, 2, 5, 1_000_000])))
        fault = draw(st.sampled_from(["replace", "replace", "replace", "cut", "drop", "repeat", "empty", "delete"]))
        if fault == "replace":
            data = data[:begin] + draw(st.sampled_from(POISON) | st.binary(max_size=4)) + data[end:]
        elif fault == "cut":
            data = data[:begin]
        elif fault == "drop":
            data = data[:begin] + data[end:]
        elif fault == "repeat":
            data = data[:begin] + data[begin:end] * 3 + data[end:]
        elif fault == "empty":
            data = draw(st.sampled_from([b"", b"\n", b"   ", b"\xef\xbb\xbf"]))
        contents[name] = data if inside is None else gzip.compress(data, mtime=0)
        if fault == "delete" and len(contents) > 1:
            del contents[name]
    return contents, draw(st.sampled_from(OPTIONS.get(source, [{}])))


def outcome(source: str, contents: dict[str, bytes], options: dict) -> str:
    """What reading and preparing ends with: counts, or the one line of a UserError."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "raw"
        folder.mkdir()
        for file, data in contents.items():
            (folder / file).write_bytes(data)
        try:
            raw = readers.read(source, folder, **options)
            filters = Filters(k_core=0, min_length=1, split="ratio", valid_fraction=0)
            meta = prepare(source, raw, Path(name) / "out", filters)
        except UserError as error:
            message = str(error)
            assert message.strip()
            assert len(message.splitlines()) == 1, message
            assert len(message) < 1500, message
            return message.replace(name, "")
        counts = meta["counts"]
        assert counts["read"] == sum(counts["left_out"].values()) + counts["interactions"]
        assert raw.interactions.column_names[:3] == ["user_id", "item_id", "timestamp"]
        assert raw.interactions.column_names[3:] in ([], ["subsecond"])
        return meta["content_hash"]


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_broken_here_was_whole(kind):
    source, contents = WHOLE[kind]
    result = outcome(source, contents, {})
    # These few rows may leave nothing to test on; they are read.
    assert " " not in result or "leaves the test part empty" in result


@pytest.mark.parametrize("kind", WHOLE)
def test_broken_files_end_in_success_or_one_line(kind):
    source = WHOLE[kind][0]

    @settings(max_examples=120, derandomize=True, database=None, deadline=None,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(broken(kind))
    @example((dict.fromkeys(WHOLE[kind][1], b""), {}))
    @example((dict.fromkeys(WHOLE[kind][1], codecs.BOM_UTF8), {}))
    @example(({name: data[: len(data) // 2] for name, data in WHOLE[kind][1].items()}, {}))
    def run(case: tuple[dict[str, bytes], dict]) -> None:
        contents, options = case
        began = time.monotonic()
        first = outcome(source, contents, options)
        assert time.monotonic() - began < SLOWEST
        assert outcome(source, contents, options) == first, "the same input has to end the same way"
        outcomes[kind, " " in first] += 1

    run()
    assert outcomes[kind, True] >= 10, "hardly anything was broken"
    assert outcomes[kind, True] + outcomes[kind, False] >= 80
