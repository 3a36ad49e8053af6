"""UCI Online Retail: one row a sold line, an invoice number on each."""

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rec.data import raw

COLUMNS = ("InvoiceNo", "StockCode", "Description", "InvoiceDate", "CustomerID")
# Products have five digits and at most two letters; POST, M, D, DOT, BANK CHARGES, AMAZONFEE, gift_0001_20,
# PADS, CRUK, S, B, C2 and TEST... are postage, manual bookings, fees, vouchers and tests.
PRODUCT_CODE = re.compile(r"\d{5}[A-Za-z]{0,2}")


def read(folder: Path, users: Literal["customers", "invoices"] = "customers") -> raw.RawData:
    """Read ``online_retail.csv`` (original UCI columns, ISO dates).

    Args:
        folder: the folder or the file.
        users: whose sequences: a customer's lines over time, or the lines of one invoice in their order.

    Rows that are left out, each counted under the first reason that applies: cancellations (invoice numbers
    that start with C), codes that are no product, no description, and no customer (or invoice) number.
    An item's ``description`` is the most frequent one of its code (they vary in spelling), ties by the alphabet.
    """
    path = raw.find_file(folder, "online_retail.csv", "online-retail.csv", "data.csv")
    table = raw.read_delimited(path)
    raw.require_columns(table, path, *COLUMNS)
    columns = {name: _trimmed(table[name]) for name in COLUMNS}
    reasons = {
        "cancellation": np.array([invoice[:1] in ("C", "c") for invoice in columns["InvoiceNo"]], dtype=bool),
        "code_is_no_product": ~_matches(columns["StockCode"], PRODUCT_CODE),
        "no_description": columns["Description"] == "",
    }
    owner = columns["CustomerID" if users == "customers" else "InvoiceNo"]
    reasons["no_customer" if users == "customers" else "no_invoice"] = owner == ""
    keep, dropped = np.ones(len(table), dtype=bool), {}
    for reason, applies in reasons.items():
        dropped[reason] = int((keep & applies).sum())
        keep &= ~applies
    expected = "a date like 2010-12-01 08:26:00"
    times = raw.cast_strings(table["InvoiceDate"], pa.timestamp("s"), path, "InvoiceDate", expected)
    codes = np.char.upper(columns["StockCode"][keep].astype(str))
    interactions = pa.table(
        {
            # Spreadsheets turn whole numbers with gaps into "17850.0".
            "user_id": pa.array([user.removesuffix(".0") for user in owner[keep]], pa.string()),
            "item_id": pa.array(codes.tolist(), pa.string()),
            "timestamp": pc.cast(times, pa.int64()).filter(pa.array(keep)),
        }
    )
    items = _most_frequent_description(codes, columns["Description"][keep])
    return raw.RawData(items, interactions, [path], dropped, {} if users == "customers" else {"users": users})


def _trimmed(column: pa.ChunkedArray) -> np.ndarray:
    return pc.utf8_trim_whitespace(column).to_numpy().astype(object)


def _matches(values: np.ndarray, pattern: re.Pattern[str]) -> np.ndarray:
    unique, inverse = np.unique(values, return_inverse=True)
    return np.array([bool(pattern.fullmatch(value)) for value in unique])[inverse]


def _most_frequent_description(codes: np.ndarray, descriptions: np.ndarray) -> pa.Table:
    texts = {"item_id": codes.tolist(), "description": descriptions.tolist()}
    pairs = pa.table({name: pa.array(values, pa.string()) for name, values in texts.items()})
    counts = pairs.group_by(["item_id", "description"]).aggregate([([], "count_all")])
    counts = counts.sort_by([("count_all", "descending"), ("description", "ascending")])
    best = dict(zip(*(reversed(counts[name].to_pylist()) for name in ("item_id", "description")), strict=True))
    rows = sorted(best.items())
    return pa.table({name: pa.array([row[i] for row in rows], pa.string()) for i, name in enumerate(texts)})
