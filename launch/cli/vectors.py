"""``recalign vectors``: a catalog's item vectors from any language model."""

import argparse
import sys
from pathlib import Path

from launch.commands import add_command


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define it below ``commands``."""
    vectors = add_command(commands, "vectors", _vectors, "item vectors of a catalog, from any language model", """\
examples:
  recalign vectors runs/recformer --data data/mine --out vectors/ft.safetensors           # the last finished stage
  recalign vectors runs/recformer --stage PT --data data/mine --out vectors/pt.safetensors
  recalign vectors runs/lmrec --data data/mine --out vectors/lmrec.safetensors            # [EOS] after the text
  recalign vectors sentence-transformers/all-MiniLM-L6-v2 --data data/mine --item-text "{title}, {brand}" \\
      --out vectors/minilm.safetensors
  recalign train my.yaml rec.items.kind=vectors rec.items.file=vectors/ft.safetensors rec.items.std=0.02

An interrupted encoding by a RECFORMER goes on where it was when the same command is given again.
""")  # fmt: skip
    vectors.add_argument("source", metavar="RUN|MODEL", help="run folder, model folder, or a name on the hub")
    vectors.add_argument("--data", type=Path, required=True, help="prepared folder of the catalog")
    vectors.add_argument("--out", type=Path, required=True, help="the safetensors file to make")
    vectors.add_argument("--stage", choices=("vanilla", "PT", "FT"), help="of a RECFORMER's run (default: the last)")
    vectors.add_argument("--item-text", help="template of an item's text (default: the run's, or {title})")


def _vectors(arguments: argparse.Namespace) -> None:
    from launch import vectors

    told = vectors.write(arguments.source, arguments.data, arguments.out, arguments.stage, arguments.item_text)
    sys.stdout.write(
        f"{arguments.out}: {told['items']:,} items, width {told['width']}, deviation {told['std']:.3f}"
        f"{', stage ' + told['stage'] if 'stage' in told else ''}\n"
        f"use it with rec.items.kind=vectors rec.items.file={arguments.out}, and rec.model.dim={told['width']} or"
        " rec.items.projection=true\n"
    )
