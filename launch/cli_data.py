"""The commands about data: ``recalign prepare``."""

import argparse
import sys
from pathlib import Path

from launch.commands import add_command
from rec.runtime.errors import UserError

SOURCES = ("recbole", "movielens", "online-retail", "table")


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define them below ``commands``."""
    prepare = add_command(commands, "prepare", _prepare, "turn a public source into a prepared folder", """\
examples:
  recalign prepare movielens --raw ml-1m --out data/ml-1m
  recalign prepare online-retail --raw online_retail.csv.gz --out data/online-retail
  recalign prepare online-retail --raw online_retail.csv.gz --users invoices --out data/invoices
  recalign prepare recbole --raw dataset/ml-100k --out data/ml-100k
  recalign prepare table --raw my-data --out data/mine   # interactions.csv and items.csv, or .parquet
""")  # fmt: skip
    prepare.add_argument("source", choices=SOURCES, help="format of the raw data")
    prepare.add_argument("--raw", type=Path, required=True, help="folder or file of the raw data")
    prepare.add_argument("--out", type=Path, required=True, help="the prepared folder to make")
    prepare.add_argument("--users", choices=("customers", "invoices"), help="online-retail: whose sequences")
    prepare.add_argument("--k-core", type=int, default=5, help="least interactions of users and items (default: 5)")
    prepare.add_argument(
        "--min-length", type=int, default=3, help="least interactions of a user after that (default: 3)"
    )
    prepare.add_argument("--repeats", choices=("keep", "drop"), default="keep", help="a user's repeated items")


def _prepare(arguments: argparse.Namespace) -> None:
    from rec.data import readers
    from rec.data.prepare import Filters, prepare
    from rec.runtime import config

    if arguments.users and arguments.source != "online-retail":
        raise UserError("--users belongs to online-retail only")
    options = {"users": arguments.users} if arguments.users else {}
    filters = config.build(
        Filters,
        {"k_core": arguments.k_core, "min_length": arguments.min_length, "repeats": arguments.repeats},
    )
    raw = readers.read(arguments.source, arguments.raw, **options)
    counts = prepare(arguments.source, raw, arguments.out, filters)["counts"]
    kept = ", ".join(f"{counts[what]:,} {what}" for what in ("users", "items", "interactions"))
    lines = [f"{arguments.out}: {kept}"]
    lines += [f"  left out, {reason.replace('_', ' ')}: {count:,}" for reason, count in counts["left_out"].items()]
    sys.stdout.write("\n".join(lines) + "\n")
