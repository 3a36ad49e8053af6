"""The commands about language models: ``recalign knowledge``."""

import argparse
import sys
from pathlib import Path

from launch.commands import add_command
from rec.runtime.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define them below ``commands``."""
    knowledge = add_command(commands, "knowledge", _knowledge, "write an LLM's knowledge of a whole catalog", """\
examples:
  recalign knowledge runs/demo --out knowledge.parquet              # the aligned LLM of a run
  recalign knowledge runs/demo --original --out before.parquet      # the one that it started from
  recalign knowledge my.yaml --data data/new-catalog --out knowledge.parquet

Texts that the file holds already are kept: run it again after a kill, or when the catalog has new items.
""")  # fmt: skip
    knowledge.add_argument("source", type=Path, metavar="RECIPE|RUN", help="recipe or run folder of a main job")
    knowledge.add_argument("--out", type=Path, required=True, help="the parquet file to make or to complete")
    knowledge.add_argument("--data", type=Path, help="prepared folder of the catalog (default: the job's own)")
    knowledge.add_argument("--shard", metavar="I/N", help="generate one of N parts, beside N - 1 others; I from 0")
    knowledge.add_argument("--original", action="store_true", help="of a run: the LLM before alignment")


def _knowledge(arguments: argparse.Namespace) -> None:
    from pyarrow import parquet

    from launch import knowledge

    shard = _shard(arguments.shard)
    knowledge.run(arguments.source, arguments.out, arguments.data, arguments.original, shard)
    if not knowledge.is_whole(arguments.out):
        sys.stdout.write(f"Shard {arguments.shard} is done; {arguments.out} is written with the last of them\n")
        return
    table = parquet.read_table(arguments.out, columns=["item_id", "text", "key"])
    empty = sum(not text for text in table["text"].to_pylist())
    different = len(set(table["key"].to_pylist()))
    items = len(set(table["item_id"].to_pylist()))
    sys.stdout.write(f"{arguments.out}: {items:,} items, {different:,} texts, {empty:,} rows without one\n")


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    from llm.knowledge import shard_of

    try:
        return shard_of(text)
    except ValueError:
        raise UserError(f"--shard {text} is not of the form I/N with I from 0 to N - 1") from None
