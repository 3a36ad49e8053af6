"""The commands about data: ``recalign prepare`` and ``recalign data``."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from launch.commands import add_command, number
from rec.runtime.errors import UserError

SOURCES = ("amazon", "closed-world", "movielens", "online-retail", "recbole", "sequences", "table", "yelp")
MADE_UP = "closed-world"
# Which sources take which reader options.
OPTIONS = {
    "users": ("online-retail",),
    "rows": ("online-retail",),
    "min_rating": ("amazon", "movielens", "recbole", "yelp"),
    "world_seed": ("closed-world",),
}
FILTERS = (
    "k_core", "min_length", "repeats", "split", "valid_fraction", "test_fraction", "seed", "cold_items",
)  # fmt: skip

# What only some splits read.
OF_SPLITS = {
    "valid_fraction": ("ratio", "time", "users"),
    "test_fraction": ("ratio", "time", "users"),
    "seed": ("users",),
}


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define them below ``commands``."""
    prepare = add_command(commands, "prepare", _prepare, "turn a public source into a prepared folder", """\
examples:
  recalign prepare movielens --raw ml-1m --out data/ml-1m
  recalign prepare amazon --raw amazon/Gift_Cards_5.json.gz --out data/gift-cards --min-rating 3
  recalign prepare online-retail --raw online_retail.csv.gz --out data/online-retail
  recalign prepare online-retail --raw online_retail.csv.gz --out data/invoices --rows lmrec --users invoices
  recalign prepare recbole --raw dataset/ml-100k --out data/ml-100k
  recalign prepare sequences --raw s3rec/Beauty.txt --out data/amazon-beauty-2014
  recalign prepare table --raw my-data --out data/mine   # interactions.csv and items.csv, or .parquet
  recalign prepare table --raw my-data --out data/held-out-users --split users --cold-items drop
  recalign prepare movielens --raw ml-1m --out data/ml-1m --item-texts descriptions.csv  # item_id and more columns
  recalign prepare closed-world --out data/world --world-seed 1                  # made up, to test alignment
""")  # fmt: skip
    prepare.add_argument("source", choices=SOURCES, help="format of the raw data")
    prepare.add_argument("--raw", type=Path, help="folder or file of the raw data; closed-world has none")
    prepare.add_argument("--out", type=Path, required=True, help="the prepared folder to make")
    options = prepare.add_argument_group("reading")
    options.add_argument(
        "--item-texts", type=Path, metavar="FILE", help="more texts about items: csv or parquet with an item_id column"
    )
    options.add_argument("--users", choices=("customers", "invoices"), help="online-retail: whose sequences")
    options.add_argument(
        "--rows",
        choices=("products", "all", "lmrec"),
        help="online-retail: only products, all but cancellations, or as in the LMRec paper",
    )
    options.add_argument("--min-rating", type=float, help="of amazon, movielens, recbole, yelp (default: any rating)")
    options.add_argument("--world-seed", type=number(int), help="closed-world: which world (default: 0)")
    _add_filters(prepare.add_argument_group("filters, in this order"), prepare.add_argument_group("split"))

    data = commands.add_parser("data", help="look at prepared data", description="Look at prepared data.")
    stats = add_command(
        data.add_subparsers(required=True, metavar="COMMAND"),
        "stats",
        _stats,
        "a readable summary and plots of a prepared folder",
        """\
examples:
  recalign data stats data/ml-1m
  recalign data stats data/ml-1m --out figures
""",
    )
    stats.add_argument("folder", type=Path, metavar="DIR", help="a prepared folder")
    stats.add_argument("--out", type=Path, help="where stats.png and result.json go (default: DIR/stats)")


def _add_filters(filters: argparse._ArgumentGroup, split: argparse._ArgumentGroup) -> None:
    filters.add_argument("--repeats", choices=("keep", "drop"), help="a user's repeated items (default: keep)")
    filters.add_argument("--k-core", type=int, help="least interactions of users and items (default: 5)")
    filters.add_argument("--min-length", type=int, help="least interactions of a user after that (default: 3)")
    split.add_argument(
        "--split",
        choices=("leave-one-out", "ratio", "time", "users"),
        help="each user's last two; each user's last share; everything after a moment; held-out users' last",
    )
    split.add_argument("--valid-fraction", type=float, help="ratio, time, users: share to validate (default: 0.1)")
    split.add_argument("--test-fraction", type=float, help="ratio, time, users: share to test (default: 0.1)")
    split.add_argument("--seed", type=int, help="users: which of them are held out (default: 0)")
    split.add_argument(
        "--cold-items", choices=("keep", "drop"), help="targets that no training interaction has (default: keep)"
    )


def _prepare(arguments: argparse.Namespace) -> None:
    from rec.data import readers
    from rec.data.item_texts import add_item_texts
    from rec.data.prepare import Filters, prepare
    from rec.runtime import config

    options = _given(arguments, *OPTIONS)
    for name in options:
        if arguments.source not in OPTIONS[name]:
            raise UserError(f"--{name.replace('_', '-')} belongs to {', '.join(OPTIONS[name])} only")
    given = _given(arguments, *FILTERS)
    if (arguments.raw is None) != (arguments.source == MADE_UP):
        raise UserError(f"{arguments.source} {'needs --raw' if arguments.raw is None else 'is made up: no --raw'}")
    filters = config.build(Filters, {**(readers.closed_world.FILTERS if arguments.source == MADE_UP else {}), **given})
    for name, splits in OF_SPLITS.items():
        if name in given and filters.split not in splits:
            raise UserError(
                f"--{name.replace('_', '-')} means nothing to --split {filters.split}, only to {' and '.join(splits)}"
            )
    raw = readers.read(arguments.source, arguments.raw, **options)
    if arguments.item_texts is not None:
        raw = add_item_texts(raw, arguments.item_texts)
    counts = prepare(arguments.source, raw, arguments.out, filters)["counts"]
    kept = ", ".join(f"{counts[what]:,} {what}" for what in ("users", "items", "interactions"))
    lines = [f"{arguments.out}: {kept}"]
    lines += [f"  left out, {reason.replace('_', ' ')}: {count:,}" for reason, count in counts["left_out"].items()]
    lines += [f"  item rows, {reason.replace('_', ' ')}: {count:,}" for reason, count in counts["item_rows"].items()]
    without = counts["items_without_text"]
    if without and raw.items.num_columns > 1:
        none = (
            ": do the ids of the item file look like those of the interactions?" if without == counts["items"] else ""
        )
        lines.append(f"  items without any text: {without:,} of {counts['items']:,}{none}")
    lines.append("  " + ", ".join(f"{part} {count:,}" for part, count in counts["parts"].items() if count))
    for name in ("cold_targets", "targets_without_history"):
        if any(counts[name].values()):
            found = ", ".join(f"{split} {count:,}" for split, count in counts[name].items())
            lines.append(f"  {name.replace('_', ' ')}: {found}")
    sys.stdout.write("\n".join(lines) + "\n")


def _stats(arguments: argparse.Namespace) -> None:
    from launch import data_stats

    data_stats.run(arguments.folder, arguments.out, shlex.join(["recalign", *sys.argv[1:]]))


def _given(arguments: argparse.Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
