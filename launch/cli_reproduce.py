"""``recalign reproduce``: a paper's table or figure, or another study, from a recipe."""

import argparse
import json
import shlex
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from launch.commands import add_command, delete_run
from rec.runtime.config import read_recipe
from rec.runtime.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define it below ``commands``."""
    summary = "run a study: variants of a main job, several seeds"
    reproduce = add_command(commands, "reproduce", _reproduce, summary, """\
examples:
  recalign reproduce closed-world                           # does alignment work? three seeds, in runs/closed-world
  recalign reproduce closed-world seeds=[0] job.align.trainer.steps=200 --out runs/quick
  recalign reproduce my-study.yaml                          # resumes, or prints the table of a finished one

Keys of the study are overridden as they are, those of its main jobs behind "job.".
""")  # fmt: skip
    reproduce.add_argument("study", metavar="NAME|RECIPE", help=f"one of: {', '.join(_names())}; or a YAML file")
    reproduce.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the study")
    reproduce.add_argument("--out", type=Path, help="run folder (default: the recipe's)")
    reproduce.add_argument("--fresh", action="store_true", help="delete the run folder first")


def _names() -> list[str]:
    folder = resources.files("launch.recipes.reproduce")
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def _study(path: Path, overrides: list[str]) -> Any:
    from launch.study import StudyRun

    return StudyRun(path, overrides)


def _lmrec_study(path: Path, overrides: list[str]) -> Any:
    from launch.lmrec_study import LMRecStudyRun

    return LMRecStudyRun(path, overrides)


def _reproduce(arguments: argparse.Namespace) -> None:
    path = Path(arguments.study)
    if arguments.study in _names():
        path = Path(str(resources.files("launch.recipes.reproduce").joinpath(f"{arguments.study}.yaml")))
    elif path.suffix not in (".yaml", ".yml"):
        raise UserError(f"unknown study {arguments.study!r}; there are: {', '.join(_names())}, or name a YAML file")
    out = [f"run={json.dumps(str(arguments.out))}"] if arguments.out else []

    overrides, is_lmrec = [*arguments.overrides, *out], "pretrain" in read_recipe(path)
    study = _lmrec_study(path, overrides) if is_lmrec else _study(path, overrides)
    if arguments.fresh:
        delete_run(study.study.run)
    result = study.execute(shlex.join(["recalign", *sys.argv[1:]]))

    from launch import lmrec_tables, tables

    if is_lmrec:
        lmrec_tables.print_study(result)
    else:
        tables.print_study(result)
    sys.stdout.write(
        f"\nEverything is in {study.study.run}: result.json, and a run folder for every seed and variant\n"
    )
