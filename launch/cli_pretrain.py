"""``recalign pretrain``: language models that are trained on behaviour."""

import argparse
import shlex
import sys
from pathlib import Path

from launch.commands import add_command, add_run_options
from rec.runtime.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define it below ``commands``."""
    summary = "train a language model on behaviour: RECFORMER's stages PT, FT1 and FT2"
    pretrain = add_command(commands, "pretrain", _pretrain, summary, """\
examples:
  recalign pretrain launch/recipes/recformer-beauty.yaml
  recalign pretrain my.yaml llm.recformer.processes=2 llm.recformer.zero_stage=2
  recalign pretrain runs/recformer/config.yaml              # resume, or say that it is done
  accelerate launch --config_file launch/accelerate/gpu.yaml -m llm.recformer.pretrain --config my.yaml
""")  # fmt: skip
    pretrain.add_argument("recipe", type=Path, help="YAML recipe, or the config.yaml of a run folder")
    add_run_options(pretrain)


def _pretrain(arguments: argparse.Namespace) -> None:
    from rec.runtime.config import apply_overrides, read_recipe

    content = apply_overrides(read_recipe(arguments.recipe), arguments.overrides)
    if not (content.get("llm") or {}).get("recformer"):
        raise UserError(f"{arguments.recipe} has no llm.recformer section")

    from launch import recformer

    recformer.run_command(
        arguments.recipe, arguments.overrides, arguments.fresh, shlex.join(["recalign", *sys.argv[1:]])
    )
