"""Interactions of any number in four file formats, to measure ``recalign prepare`` with.

    python tests/rec/make_interactions.py 10000000 OUT     # OUT/csv, OUT/csv-gz, OUT/parquet, OUT/jsonl-gz

Every format holds the same interactions: popular items and busy users are far more frequent than others, ids are as
long as Amazon's, rows are in no order of time, and 100,000 items have a title.
"""

import argparse
import gzip
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import csv, parquet

BLOCK = 500_000
N_ITEMS, BEGIN = 100_000, 1_300_000_000


def blocks(n: int, seed: int = 0) -> Iterator[pa.Table]:
    """[n] rows in tables of 500,000: users about n / 10, items up to 100,000, times of ten years."""
    rng = np.random.default_rng(seed)
    n_users = max(1, n // 10)
    user_names = pa.array([f"A{user:013d}" for user in range(n_users)])
    item_names = pa.array([f"B{item:09d}" for item in range(N_ITEMS)])
    for begin in range(0, n, BLOCK):
        size = min(BLOCK, n - begin)
        users = (n_users * rng.random(size) ** 1.5).astype(np.int64)
        items = (N_ITEMS * rng.random(size) ** 3).astype(np.int64)
        yield pa.table(
            {
                "user_id": user_names.take(pa.array(users)),
                "item_id": item_names.take(pa.array(items)),
                "timestamp": pa.array(BEGIN + rng.integers(10 * 365 * 86_400, size=size)),
            }
        )


def write(n: int, out: Path) -> None:
    """Write all four."""
    folders = {name: out / name for name in ("csv", "csv-gz", "parquet", "jsonl-gz")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    titles = [f"Thing number {item}" for item in range(N_ITEMS)]
    items = pa.table({"item_id": [f"B{item:09d}" for item in range(N_ITEMS)], "title": titles})
    csv.write_csv(items, folders["csv"] / "items.csv")
    csv.write_csv(items, folders["csv-gz"] / "items.csv")
    parquet.write_table(items, folders["parquet"] / "items.parquet")
    with (folders["jsonl-gz"] / "meta_Things.jsonl").open("w") as stream:
        stream.writelines(f'{{"asin": "B{item:09d}", "title": "{title}"}}\n' for item, title in enumerate(titles))
    schema = next(blocks(1)).schema
    with (
        csv.CSVWriter(folders["csv"] / "interactions.csv", schema) as plain,
        gzip.open(folders["csv-gz"] / "interactions.csv.gz", "wb", 1) as packed,
        csv.CSVWriter(packed, schema) as plain_packed,
        parquet.ParquetWriter(folders["parquet"] / "interactions.parquet", schema) as columns,
        gzip.open(folders["jsonl-gz"] / "Things_5.jsonl.gz", "wt", 1) as lines,
    ):
        for table in blocks(n):
            for writer in (plain, plain_packed, columns):
                writer.write_table(table)
            rows = zip(*(table[name].to_pylist() for name in table.column_names), strict=True)
            lines.writelines(
                f'{{"overall": 5.0, "verified": true, "reviewerID": "{user}", "asin": "{item}", "reviewText": "Works as'
                f' it should, and so did the one before.", "unixReviewTime": {time}}}\n'
                for user, item, time in rows
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", type=int)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    write(arguments.n, arguments.out)
