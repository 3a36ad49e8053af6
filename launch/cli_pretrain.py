"""``recalign pretrain`` and ``recalign probe``: language models of behaviour histories."""

import argparse
import shlex
import sys
from pathlib import Path

from launch.commands import add_command, add_run_options, delete_run
from rec.runtime.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define them below ``commands``."""
    pretrain = add_command(commands, "pretrain", _pretrain, "train LMRec on behaviour histories", """\
examples:
  recalign pretrain launch/recipes/lmrec-online-retail.yaml
  recalign pretrain my.yaml llm.language=false run=runs/lmrec-lm      # LMRec -lm
  recalign pretrain runs/lmrec/config.yaml                            # resume a run
  accelerate launch --config_file launch/accelerate/gpu.yaml -m llm.pretrain --config my.yaml   # what it starts
""")  # fmt: skip
    pretrain.add_argument("recipe", type=Path, help="YAML recipe")
    add_run_options(pretrain)

    probe = add_command(commands, "probe", _probe, "linear heads on frozen features of a pretrained LMRec", """\
examples:
  recalign probe launch/recipes/lmrec-probe.yaml llm.model=runs/lmrec
Features are computed once and kept in the run folder; heads are then trained in seconds.
""")  # fmt: skip
    probe.add_argument("recipe", type=Path, help="YAML recipe")
    add_run_options(probe)


def _pretrain(arguments: argparse.Namespace) -> None:
    from llm import lmrec_job

    if lmrec_job.is_recformer(lmrec_job.read(arguments.recipe, arguments.overrides)):
        raise UserError(f"{arguments.recipe} is a recipe of RECFORMER: start -m llm.recformer.pretrain with it")
    job = lmrec_job.load_job(arguments.recipe, arguments.overrides)
    if arguments.fresh:
        delete_run(job.run)

    from launch import lmrec_tables, pretraining

    lmrec_tables.print_pretraining(pretraining.pretrain(job), job.run)


def _probe(arguments: argparse.Namespace) -> None:
    from llm import probe

    job = probe.load_job(arguments.recipe, arguments.overrides)
    if arguments.fresh:
        delete_run(job.run)
    result = probe.run(job, shlex.join(["recalign", *sys.argv[1:]]))

    from launch import lmrec_tables

    lmrec_tables.print_probe(result, job.run)
