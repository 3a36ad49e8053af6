"""``recalign reproduce``: a paper's table or figure, or another study, from a recipe."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from launch.commands import add_command, add_run_options, delete_run
from rec.runtime.config import read_recipe
from rec.runtime.errors import UserError


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Define it below ``commands``."""
    summary = "run a study: a paper's table or figure, several variants and seeds"
    reproduce = add_command(commands, "reproduce", _reproduce, summary, """\
examples:
  recalign reproduce closed-world                           # does alignment work? three seeds, in runs/closed-world
  recalign reproduce closed-world seeds=[0] job.align.trainer.steps=200 --out runs/quick
  recalign reproduce elephant-table3 --target amazon-beauty-2014
  recalign reproduce my-study.yaml                          # resumes, or prints the table of a finished one

Keys of the study are overridden as they are, those of its main jobs behind "job.".
""")  # fmt: skip
    reproduce.add_argument("study", metavar="NAME|RECIPE", help=f"one of: {', '.join(_names())}; or a YAML file")
    reproduce.add_argument("--target", help="of the Elephant's studies: the domain that is evaluated on")
    reproduce.add_argument("--out", type=Path, help="run folder (default: the recipe's)")
    add_run_options(reproduce)


def _names() -> list[str]:
    folder = resources.files("launch.recipes.reproduce")
    return sorted(path.name.removesuffix(".yaml") for path in folder.iterdir() if path.name.endswith(".yaml"))


def _reproduce(arguments: argparse.Namespace) -> None:
    path = Path(arguments.study)
    if arguments.study in _names():
        path = Path(str(resources.files("launch.recipes.reproduce").joinpath(f"{arguments.study}.yaml")))
    elif path.suffix not in (".yaml", ".yml"):
        raise UserError(f"unknown study {arguments.study!r}; there are: {', '.join(_names())}, or name a YAML file")
    content = read_recipe(path)
    if arguments.target and "recformer" not in content:
        raise UserError(f"--target has no meaning for {arguments.study}: it is no study of the Elephant's")
    out = [f"run={json.dumps(str(arguments.out))}"] if arguments.out else []
    target = [f"target={json.dumps(arguments.target)}"] if arguments.target else []
    study, show = _study(content, path, [*arguments.overrides, *target, *out])
    if arguments.fresh:
        delete_run(study.out)
    show(study.execute(shlex.join(["recalign", *sys.argv[1:]])))
    sys.stdout.write(f"\nEverything is in {study.out}: result.json, and the run folders that it is made of\n")


def _study(content: dict[str, Any], path: Path, overrides: list[str]) -> tuple[Any, Callable[[dict[str, Any]], None]]:
    """The study that a recipe means, which its keys tell, and what prints its result."""
    if "recformer" in content:
        from launch.elephant import claims
        from launch.elephant.study import ElephantRun

        return ElephantRun(path, overrides), claims.print_study
    if "pretrain" in content:
        from launch.lmrec import tables
        from launch.lmrec.study import LMRecStudyRun

        return LMRecStudyRun(path, overrides), tables.print_study

    from launch import tables
    from launch.alignment.study import StudyRun

    return StudyRun(path, overrides), tables.print_study
