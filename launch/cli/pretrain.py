"""``recalign pretrain`` and ``recalign probe``: language models that are trained on behaviour."""

import argparse
import shlex
import sys
from pathlib import Path

from launch.commands import add_command, add_run_options, delete_run


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define them below ``commands``."""
    pretrain = add_command(commands, "pretrain", _pretrain, "train LMRec, or RECFORMER's stages, on behaviour", """\
examples:
  recalign pretrain launch/recipes/lmrec-online-retail.yaml
  recalign pretrain my.yaml llm.language=false run=runs/lmrec-lm      # LMRec -lm
  recalign pretrain launch/recipes/recformer-beauty.yaml              # a recipe with llm.recformer is RECFORMER's
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
        from launch import recformer

        command = shlex.join(["recalign", *sys.argv[1:]])
        recformer.run_command(arguments.recipe, arguments.overrides, arguments.fresh, command)
        return
    job = lmrec_job.load_job(arguments.recipe, arguments.overrides)
    if arguments.fresh:
        delete_run(job.run)

    from launch import pretraining
    from launch.lmrec import tables

    tables.print_pretraining(pretraining.pretrain(job), job.run)


def _probe(arguments: argparse.Namespace) -> None:
    from llm import probe
    from llm.probe_job import load_job

    job = load_job(arguments.recipe, arguments.overrides)
    if arguments.fresh:
        delete_run(job.run)
    result = probe.run(job, shlex.join(["recalign", *sys.argv[1:]]))

    from launch.lmrec import tables

    tables.print_probe(result, job.run)
