"""UCI Online Retail: one row a sold line, an invoice number on each."""

from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from rec.data import raw, textfile
from rec.data.readers import spreadsheet
from rec.runtime.errors import UserError

COLUMNS = ("InvoiceNo", "StockCode", "Description", "InvoiceDate", "CustomerID")
# Products have five digits and at most two letters; POST, M, D, DOT, BANK CHARGES, AMAZONFEE, gift_0001_20,
# PADS, CRUK, S, B, C2 and TEST... are postage, manual bookings, fees, vouchers and tests.
PRODUCT_CODE = r"^\d{5}[A-Za-z]{0,2}$"
FILES = ("online_retail.csv", "online-retail.csv", "data.csv", "Online Retail.xlsx", "online_retail.xlsx")

Rows = Literal["products", "all", "lmrec"]


def read(folder: Path, users: Literal["customers", "invoices"] = "customers", rows: Rows = "products") -> raw.RawData:
    """Read ``online_retail.csv`` or ``Online Retail.xlsx`` (original UCI columns; ISO dates in csv).

    Args:
        folder: the folder or the file.
        users: whose sequences: a customer's lines over time, or the lines of one invoice in their order.
        rows: ``products`` leaves out cancellations (invoice numbers that start with C), codes that are no product,
            and lines without description; ``all`` leaves out cancellations only; ``lmrec`` leaves out lines
            without description and repeated (InvoiceNo, StockCode, Quantity, InvoiceDate), keeps cancellations
            and takes codes as they are spelt: with invoices as users and a 5-core it gives LMRec's table 3.

    Rows that are left out are counted under the first reason that applies, the last one being no customer (or
    invoice) number. But for ``lmrec``, codes are upper-cased: the shop spells some both ways. An item's
    ``description`` is the most frequent one of its code (they vary in spelling), ties by the alphabet.
    """
    path = raw.find_file(folder, *FILES)
    if path.suffix == ".xlsx":
        table = spreadsheet.read(path)
        raw.require_columns(table.column_names, path, *COLUMNS)
    else:
        table = textfile.read_delimited(path)
        raw.require_columns(table.column_names, path, *COLUMNS)
    columns = {name: pc.utf8_trim_whitespace(table[name]) for name in COLUMNS}
    expected = "a date like 2010-12-01 08:26:00"
    columns["time"] = raw.cast_strings(table["InvoiceDate"], pa.timestamp("s"), path, "InvoiceDate", expected)
    owner = "CustomerID" if users == "customers" else "InvoiceNo"
    keep, dropped = pa.chunked_array([pa.repeat(pa.scalar(True), len(table))]), {}
    for reason, applies in _reasons(table, columns, path, rows, owner).items():
        dropped[reason] = pc.sum(pc.and_(keep, applies)).as_py() or 0
        keep = pc.and_(keep, pc.invert(applies))
    nameless = pc.index(pc.and_(keep, pc.equal(columns["StockCode"], "")), True).as_py()
    if nameless >= 0:
        raise UserError(f"{path}, data row {nameless + 1}: StockCode is empty")
    codes = columns["StockCode"] if rows == "lmrec" else pc.utf8_upper(columns["StockCode"])
    interactions = pa.table(
        {
            # Spreadsheets turn whole numbers with gaps into "17850.0".
            "user_id": pc.replace_substring_regex(columns[owner], r"\.0$", ""),
            "item_id": codes,
            "timestamp": pc.cast(columns["time"], pa.int64()),
        }
    ).filter(keep)
    items = _most_frequent_description(interactions["item_id"], columns["Description"].filter(keep))
    options = {"users": users, "rows": rows}
    defaults = {"users": "customers", "rows": "products"}
    differing = {name: value for name, value in options.items() if value != defaults[name]}
    return raw.RawData(items, interactions, [path], dropped, differing)


def _reasons(
    table: pa.Table, columns: dict[str, pa.ChunkedArray], path: Path, rows: Rows, owner: str
) -> dict[str, pa.ChunkedArray]:
    """Masks of the rows to leave out, by reason, in the order in which they count."""
    reasons = {}
    if rows != "lmrec":
        reasons["cancellation"] = pc.starts_with(columns["InvoiceNo"], "C", ignore_case=True)
    if rows == "products":
        reasons["code_is_no_product"] = pc.invert(pc.match_substring_regex(columns["StockCode"], PRODUCT_CODE))
    if rows != "all":
        reasons["no_description"] = pc.equal(columns["Description"], "")
    if rows == "lmrec":
        raw.require_columns(table.column_names, path, "Quantity")
        # Lines without description are gone before: they make no line a repeated one.
        described = pc.invert(reasons["no_description"])
        keys = {"row": pa.array(range(len(table))), "described": described, "quantity": table["Quantity"]}
        keys |= {name: columns[name] for name in ("InvoiceNo", "StockCode", "InvoiceDate")}
        grouped = pa.table(keys).group_by(["described", "InvoiceNo", "StockCode", "quantity", "InvoiceDate"])
        firsts = grouped.aggregate([("row", "min")])["row_min"]
        reasons["repeated_line"] = pc.invert(pc.is_in(keys["row"], value_set=firsts.combine_chunks()))
    reasons["no_customer" if owner == "CustomerID" else "no_invoice"] = pc.equal(columns[owner], "")
    return reasons


def _most_frequent_description(codes: pa.ChunkedArray, descriptions: pa.ChunkedArray) -> pa.Table:
    pairs = pa.table({"item_id": codes, "description": descriptions})
    counts = pairs.group_by(["item_id", "description"]).aggregate([([], "count_all")])
    # A description, even a rare one, says more than none.
    counts = counts.append_column("empty", pc.equal(counts["description"], ""))
    order = [("item_id", "ascending"), ("empty", "ascending"), ("count_all", "descending")]
    counts = counts.sort_by([*order, ("description", "ascending")])
    best: dict[str, str] = {}
    for item, description in zip(counts["item_id"].to_pylist(), counts["description"].to_pylist(), strict=True):
        best.setdefault(item, description)
    columns = {"item_id": list(best), "description": list(best.values())}
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
