"""Further formats and options: MovieLens csv, ratings, Online Retail's sheet and rows, sequences, kinds of time."""

import builtins
import datetime
import gzip

import make_interactions
import pyarrow as pa
import pytest
from pyarrow import parquet
from raw_files import HEADER, RETAIL_HEADER, csv_pair, message_of, retail_row, rows_of, write_files

from rec.data import readers, textfile
from rec.data.prepare import Filters, prepare
from rec.runtime.errors import UserError


def test_movielens_csv(tmp_path):
    ratings = "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n2,296,0.5,1147868828\n"
    movies = 'movieId,title,genres\n296,"Fiction, Pulp (1994)",Comedy|Crime\n306,Red,(no genres listed)\n'
    raw = readers.read("movielens", write_files(tmp_path, ratings__csv=ratings, movies__csv=movies))
    assert rows_of(raw) == [("1", "296", 1147880044), ("1", "306", 1147868817), ("2", "296", 1147868828)]
    assert raw.items.to_pylist() == [
        {"item_id": "296", "title": "Fiction, Pulp", "year": "1994", "genres": "Comedy, Crime"},
        {"item_id": "306", "title": "Red", "year": "", "genres": ""},
    ]
    write_files(tmp_path, ratings__csv=ratings.replace("movieId", "movie"))
    assert "ratings.csv has no column 'movieId'; it has: userId, movie" in message_of("movielens", tmp_path)


@pytest.mark.parametrize("name", ["ratings.csv", "ratings.dat", "u.data"])
def test_movielens_ratings_below_the_minimum_are_left_out(tmp_path, name):
    rows = [("1", "9", "3", "5"), ("1", "8", "2.5", "6"), ("2", "9", " 4 ", "7")]
    delimiter = {"ratings.csv": ",", "ratings.dat": "::", "u.data": "\t"}[name]
    header = "userId,movieId,rating,timestamp\n" if name == "ratings.csv" else ""
    (tmp_path / name).write_text(header + "".join(delimiter.join(row) + "\n" for row in rows))
    write_files(tmp_path, movies__csv="movieId,title,genres\n9,A,B\n", movies__dat="9::A::B\n")
    write_files(tmp_path, u__item="|".join(["9", "A", "", "", "", *["0"] * 19]) + "\n")
    raw = readers.read("movielens", tmp_path, min_rating=3)
    assert rows_of(raw) == [("1", "9", 5), ("2", "9", 7)]
    assert raw.dropped == {"rating_too_low": 1}
    assert raw.options == {"min_rating": "3"}
    (tmp_path / name).write_text((tmp_path / name).read_text().replace("2.5", "good"))
    assert "data row 2: rating is 'good', not a number" in message_of("movielens", tmp_path, min_rating=3)


def test_movielens_10m_titles_are_utf8(tmp_path):
    write_files(tmp_path, ratings__dat="1::7::5::8\n", movies__dat="7::Élan: Vital:: (1999)::Drama\n")
    assert "Row #1: Expected 3 columns, got 4" in message_of("movielens", tmp_path)
    write_files(tmp_path, movies__dat="7::Élan: Vital (1999)::Drama\n")
    assert readers.read("movielens", tmp_path).items["title"].to_pylist() == ["Élan: Vital"]


RETAIL_ROWS = [
    retail_row(),
    retail_row(),  # a repeated line
    retail_row(date="2010-12-01 08:27:00"),
    retail_row(code="85123a"),
    retail_row(invoice="C3", code="POST"),
    retail_row(description="", code="M"),
    retail_row(customer="", code="D"),
]


def test_retail_rows_all_and_lmrec(tmp_path):
    write_files(tmp_path, online_retail__csv=RETAIL_HEADER + "".join(RETAIL_ROWS))
    everything = readers.read("online-retail", tmp_path, rows="all")
    assert [row[1] for row in rows_of(everything)] == ["85123A"] * 4 + ["M"]
    assert everything.dropped == {"cancellation": 1, "no_customer": 1}
    assert everything.options == {"rows": "all"}
    lmrec = readers.read("online-retail", tmp_path, rows="lmrec", users="invoices")
    assert [row[:2] for row in rows_of(lmrec)] == [
        ("1", "85123A"), ("1", "85123A"), ("1", "85123a"), ("C3", "POST"), ("1", "D"),
    ]  # fmt: skip
    assert lmrec.dropped == {"no_description": 1, "repeated_line": 1, "no_invoice": 0}
    assert lmrec.options == {"users": "invoices", "rows": "lmrec"}


def test_a_line_without_description_repeats_nothing(tmp_path):
    rows = [retail_row(description=""), retail_row(), retail_row()]
    write_files(tmp_path, online_retail__csv=RETAIL_HEADER + "".join(rows))
    raw = readers.read("online-retail", tmp_path, rows="lmrec")
    assert len(raw.interactions) == 1
    assert raw.dropped == {"no_description": 1, "repeated_line": 1, "no_customer": 0}


def test_retail_sheet_is_the_same_as_its_csv(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    write_files(tmp_path / "csv", online_retail__csv=RETAIL_HEADER + "".join(RETAIL_ROWS))
    book = openpyxl.Workbook()
    book.active.append(RETAIL_HEADER.strip().split(","))
    for row in RETAIL_ROWS:
        invoice, code, description, quantity, date, price, customer, country = row.strip().split(",")
        cells = [int(invoice) if invoice.isdigit() else invoice, code, description or None, int(quantity)]
        cells += [datetime.datetime.fromisoformat(date), float(price), float(customer) if customer else None, country]
        book.active.append(cells)
    (tmp_path / "xlsx").mkdir()
    book.save(tmp_path / "xlsx" / "Online Retail.xlsx")
    for options in ({}, {"rows": "all"}, {"rows": "lmrec", "users": "invoices"}):
        sheet, text = (readers.read("online-retail", tmp_path / kind, **options) for kind in ("xlsx", "csv"))
        assert rows_of(sheet) == rows_of(text)
        assert sheet.items == text.items
        assert sheet.dropped == text.dropped


def test_retail_sheets_that_cannot_be_read_are_one_line(tmp_path, monkeypatch):
    openpyxl = pytest.importorskip("openpyxl")
    path = tmp_path / "Online Retail.xlsx"
    path.write_bytes(b"PK not really")
    assert "Online Retail.xlsx is not a readable .xlsx file" in message_of("online-retail", tmp_path)
    book = openpyxl.Workbook()
    book.save(path)
    assert "the first row has empty or repeated column names" in message_of("online-retail", tmp_path)
    book.active.append(["InvoiceNo", "StockCode"])
    book.save(path)
    assert "has a header line but no rows" in message_of("online-retail", tmp_path)
    book.active.append(["1", "2"])
    book.save(path)
    assert "has no column 'Description'" in message_of("online-retail", tmp_path)
    original = builtins.__import__

    def without_openpyxl(name, *args, **kwargs):
        if name == "openpyxl":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_openpyxl)
    assert "needs openpyxl: 'pip install openpyxl', or save the sheet as csv" in message_of("online-retail", tmp_path)


@pytest.mark.parametrize("compressed", [False, True])
def test_sequences_keep_their_order(tmp_path, compressed):
    text = b"u2 b a b\r\n\n  u1\tc   a  \nu3 c\n\n"
    path = tmp_path / ("Beauty.txt.gz" if compressed else "Beauty.txt")
    path.write_bytes(gzip.compress(text) if compressed else text)
    write_files(tmp_path, items__csv="item_id,title\nc,C\na,A\n")
    raw = readers.read("sequences", tmp_path)
    assert rows_of(raw) == [
        ("u2", "b", 0), ("u2", "a", 1), ("u2", "b", 2), ("u1", "c", 0), ("u1", "a", 1), ("u3", "c", 0),
    ]  # fmt: skip
    assert raw.items["title"].to_pylist() == ["C", "A"]
    assert rows_of(readers.read("sequences", path)) == rows_of(raw)


def test_sequences_larger_than_a_block(tmp_path):
    expected = [(f"u{user}", f"i{user * step % 997}", step) for user in range(3000) for step in range(user % 120 + 1)]
    rows: dict[str, list[str]] = {}
    for user, item, _ in expected:
        rows.setdefault(user, []).append(item)
    text = "".join(f"{user} {' '.join(items)}\n" for user, items in rows.items())
    assert len(text) > textfile.BLOCK * 0.8
    write_files(tmp_path, x__txt=text + text.replace("u", "v"))
    found = rows_of(readers.read("sequences", tmp_path))
    assert found == expected + [("v" + user[1:], item, step) for user, item, step in expected]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("u1 a b\n\nu2\n", "line 3: a user without items"),
        ("u1 a b\nu2 a\nu1 c\n", "line 3: user 'u1' was there before; each user has one line"),
        ("", "x.txt is empty"),
        (b"u1 a\nu2 \xe9\n", "line 2: not utf-8 text (byte 0xe9)"),
    ],
)
def test_bad_sequences_name_their_line(tmp_path, text, expected):
    assert expected in message_of("sequences", write_files(tmp_path, x__txt=text))


def test_sequences_need_one_file(tmp_path):
    assert message_of("sequences", tmp_path / "none") == f"raw data not found: {tmp_path / 'none'}"
    assert "holds 0 .txt files of sequences; name one" in message_of("sequences", tmp_path)
    write_files(tmp_path, a__txt="u a\n", b__txt="u a\n")
    assert "holds 2 .txt files of sequences: a.txt, b.txt; name one" in message_of("sequences", tmp_path)


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["0", "1", "1"], [0, 1, 1]),
        (["2014-07-23", " 2014-07-22 ", "1969-12-31"], [1406073600, 1405987200, -86400]),
        (
            ["2010-12-01 08:26:00", "2010-12-01T08:26:01", "2010-12-01 08:26:01.75"],
            [1291191960, 1291191961, 1291191961],
        ),
        (["2010-12-01T08:26:00Z", "2010-12-01T09:26:00+01:00", "2010-12-01T08:26:00Z"], [1291191960] * 3),
        (["2010-12-01 08:26:00.5+00:00", "2010-12-01 09:26:00.25+01:00", "2010-12-01 08:26:00Z"], [1291191960] * 3),
    ],
)
def test_table_times_may_be_positions_numbers_or_dates(tmp_path, texts, expected):
    csv_pair(tmp_path, HEADER + "".join(f"u,a,{text}\n" for text in texts))
    assert [row[2] for row in rows_of(readers.read("table", tmp_path))] == expected
    csv_pair(tmp_path, HEADER + "".join(f"u,a,{text}\n" for text in [*texts, "x"]))
    assert "data row 4: timestamp is 'x', not " in message_of("table", tmp_path)


def test_table_dates_mixed_with_numbers_name_the_row(tmp_path):
    csv_pair(tmp_path, HEADER + "u,a,2010-12-01\nu,a,12\n")
    assert "data row 2: timestamp is '12', not a date like 2010-12-01 08:26:00" in message_of("table", tmp_path)


def test_parquet_ids_of_any_type_are_text(tmp_path):
    ids = {
        "int": pa.array([3, 3, 11]),
        "category": pa.array(["x", "x", "y"]).dictionary_encode(),
        "large": pa.array(["x", "x", "y"], pa.large_string()),
        "bytes": pa.array([b"x", b"x", b"y"]),
    }
    for name, column in ids.items():
        folder = tmp_path / name
        folder.mkdir()
        table = pa.table({"item_id": column, "user_id": column, "timestamp": [1, 2, 3], "more": [[1], [2], [3]]})
        parquet.write_table(table, folder / "interactions.parquet")
        expected = ["3", "3", "11"] if name == "int" else ["x", "x", "y"]
        assert [row[:2] for row in rows_of(readers.read("table", folder))] == [(text, text) for text in expected]


def test_ids_that_look_alike_stay_apart(tmp_path):
    csv_pair(tmp_path, HEADER + "1,a,1\n1.0,a ,2\n01,A,3\n")
    assert [row[:2] for row in rows_of(readers.read("table", tmp_path))] == [("1", "a"), ("1.0", "a "), ("01", "A")]


def test_a_null_id_in_parquet_names_its_row(tmp_path):
    table = pa.table({"item_id": ["a", "b", None], "user_id": [1, None, 3], "timestamp": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "interactions.parquet")
    assert "interactions.parquet, data row 2: user_id is empty" in message_of("table", tmp_path)


def test_rows_beyond_the_first_block_keep_their_numbers(tmp_path):
    csv_pair(tmp_path, HEADER + "user,item,1\n" * 300_000 + "user,,1\n")
    assert "data row 300001: item_id is empty" in message_of("table", tmp_path)
    csv_pair(tmp_path, HEADER + "user,item,1\n" * 300_000 + "user,item,then\n")
    assert "data row 300001: timestamp is 'then', not a number" in message_of("table", tmp_path)
    csv_pair(tmp_path, (HEADER + "user,item,1\n" * 300_000).encode() + b"user,\xff,1\n")
    assert "line 300002: not utf-8 text (byte 0xff)" in message_of("table", tmp_path)


def test_text_cut_inside_a_letter_is_named(tmp_path):
    csv_pair(tmp_path, (HEADER + "u,a,1\nu,").encode() + "é".encode()[:1])
    assert "line 3: not utf-8 text (byte 0xc3)" in message_of("table", tmp_path)


def test_letters_and_delimiters_across_blocks_are_whole(tmp_path, monkeypatch):
    rows = [("ü" * n, "né", str(n)) for n in range(1, 30)]
    for block in (1, 2, 3, 7, 64):
        monkeypatch.setattr(textfile, "BLOCK", block)
        (tmp_path / "x.dat").write_text("".join("::".join(row) + "\n" for row in rows))
        got = b"".join(textfile._replaced(textfile.blocks(tmp_path / "x.dat"), b"::")).decode()
        assert got == "".join("\t".join(row) + "\n" for row in rows)
        numbered = list(textfile.lines(tmp_path / "x.dat"))
        assert b"".join(text for _, text in numbered).decode() == (tmp_path / "x.dat").read_text()
        starts = [sum(text.count(b"\n") for _, text in numbered[:nth]) + 1 for nth in range(len(numbered))]
        assert [number for number, _ in numbered] == starts


def test_gzip_without_its_ending_in_the_name_says_so(tmp_path):
    (tmp_path / "interactions.csv").write_bytes(gzip.compress(b"user_id,item_id,timestamp\nu,a,1\n"))
    with pytest.raises(UserError, match=r"interactions\.csv is compressed: add \.gz to its name"):
        readers.read("table", tmp_path)


def test_every_format_of_the_same_interactions_gives_the_same_bytes(tmp_path):
    make_interactions.write(60_000, tmp_path)
    assert (tmp_path / "csv" / "interactions.csv").stat().st_size > 2 * textfile.BLOCK
    found = {}
    for name in ("csv", "csv-gz", "parquet", "jsonl-gz"):
        raw = readers.read("amazon" if name == "jsonl-gz" else "table", tmp_path / name)
        prepare("t", raw, tmp_path / "out" / name, Filters(k_core=2))
        found[name] = [
            (tmp_path / "out" / name / file).read_bytes() for file in ("interactions.parquet", "users.parquet")
        ]
    assert all(files == found["csv"] for files in found.values())
