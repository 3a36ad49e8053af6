"""The commands about recommenders: train and evaluate."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from launch.commands import add_command, add_run_options, delete_run
from rec.runtime.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define them below ``commands``."""
    train = add_command(commands, "train", _train, "train a recommender", """\
examples:
  recalign train launch/recipes/sasrec-beauty.yaml
  recalign train launch/recipes/sasrec-beauty.yaml run=runs/big rec.model.dim=128
  recalign train my.yaml rec.model=BERT4Rec rec.train.lr=3e-4
  recalign train runs/big/config.yaml        # resume, or say that it is done
  accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 -m rec.train --config my.yaml
""")  # fmt: skip
    train.add_argument("recipe", type=Path, help="YAML recipe, or the config.yaml of a run folder")
    add_run_options(train)

    evaluate = add_command(commands, "evaluate", _evaluate, "rank held-out items under named protocols", """\
examples:
  recalign evaluate runs/sasrec-beauty                        # the protocol of its recipe
  recalign evaluate runs/sasrec-beauty --protocol gsasrec,elephant-100
  recalign evaluate runs/a --against runs/b                   # paired bootstrap, user by user
  recalign evaluate runs/demo/seralm --groups                 # cold/warm, new/repeat, head/tail, short/long
""")  # fmt: skip
    evaluate.add_argument("run", type=Path, help="run folder of a recommender")
    evaluate.add_argument("--protocol", help="one or more, separated by commas (default: the recipe's own)")
    evaluate.add_argument("--part", choices=("test", "valid"), default="test", help="which held-out items")
    evaluate.add_argument("--against", type=Path, metavar="RUN", help="compare with another run on the same data")
    evaluate.add_argument("--groups", action="store_true", help="show figures by kind of target and history too")


def _train(arguments: argparse.Namespace) -> None:
    from rec.job import load_job

    job = load_job(arguments.recipe, arguments.overrides)
    if arguments.fresh:
        delete_run(job.run)

    from launch import tables
    from rec.train import run

    result = run(job, shlex.join(["recalign", *sys.argv[1:]]))
    tables.print_training(result, job.run)


def _evaluate(arguments: argparse.Namespace) -> None:
    from launch import tables
    from rec.evaluate import FOLDER, compare_runs, evaluate_run
    from rec.job import open_run
    from rec.protocol import preset
    from rec.runtime import files

    if arguments.against and arguments.groups:
        raise UserError("--groups shows one run's figures, --against compares two: take one of them")
    run, command = open_run(arguments.run), shlex.join(["recalign", *sys.argv[1:]])
    if arguments.protocol:
        names = [name.strip() for name in arguments.protocol.split(",")]
        protocols = {name: preset(name) for name in names}
    else:
        protocols = {"own": run.rec.evaluate.protocol}
    if arguments.against:
        other = open_run(arguments.against)
        found = compare_runs(run, other, protocols, arguments.part, command)
        tables.print_comparison(found, run.path, other.path)
        return
    evaluate_run(run, protocols, arguments.part, command)
    folder = run.path / FOLDER
    contents: list[dict[str, Any]] = [files.read_json(folder / f"{name}-{arguments.part}.json") for name in protocols]
    tables.print_evaluations(contents, arguments.groups)
    sys.stdout.write(f"\nRanks of every user: {folder}\n")
