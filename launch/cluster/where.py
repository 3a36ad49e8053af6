"""For batch scripts: ``python -m launch.cluster.where RECIPE key=value`` prints what they need to know of a recipe.

Three lines: the run folder, the accelerate file for several nodes, and, of a pretraining, the key that says how many
ranks there are and the modules that train, one after the other.
"""

import sys
from importlib import resources
from pathlib import Path
from typing import Any

from llm.lmrec_job import is_recformer
from rec.runtime.config import apply_overrides, read_recipe
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.runfolder import run_override

# Overrides of an alignment's recipe where only the nodes will say how many processes there are: one divides any batch.
ONE_PROCESS = ("align.trainer.processes=1", "align.generator.processes=1")


def run_of(recipe: Path, overrides: list[str]) -> Path:
    """The run folder that a recipe of any kind names; of a run's own ``config.yaml``, where that lies now.

    Raises:
        UserError: if it names none.
    """
    return _run_in(_content(recipe, overrides), recipe)


def site_file(given: Path | None) -> Path:
    """The file of site settings that is ``given``; else ``launch/slurm/site.sh`` here, or the one that came along.

    Raises:
        UserError: if there is none such.
    """
    path = given or Path("launch/slurm/site.sh")
    if given is None and not path.is_file():
        return Path(str(resources.files("launch.slurm").joinpath("site.sh")))
    if not path.is_file():
        raise UserError(f"site settings not found: {path}")
    return path.absolute()


def stages_of(content: dict[str, Any]) -> tuple[str, list[str]]:
    """The key that says how many ranks a pretraining has, and the modules that train; ("", []) of other recipes."""
    if "align" in content or "llm" not in content:
        return "", []
    if not is_recformer(content):
        return "llm.train.processes", ["llm.pretrain"]
    stages = [stage for stage in ("pretrain", "finetune") if content["llm"]["recformer"].get(stage) is not None]
    return "llm.recformer.processes", [f"llm.recformer.{stage}" for stage in stages]


def _content(recipe: Path, overrides: list[str]) -> dict[str, Any]:
    return apply_overrides(read_recipe(recipe), [*run_override(recipe), *overrides])


def _run_in(content: dict[str, Any], recipe: Path) -> Path:
    if not content.get("run"):
        raise UserError(f"missing key 'run' in {recipe}")
    return Path(str(content["run"]))


def main() -> None:
    """Entry of the module."""
    if len(sys.argv) < 2:
        raise UserError("which recipe? python -m launch.cluster.where RECIPE key=value")
    recipe = Path(sys.argv[1])
    content = _content(recipe, sys.argv[2:])
    launcher = resources.files("launch.accelerate").joinpath("multi-node.yaml")
    key, modules = stages_of(content)
    sys.stdout.write(f"{_run_in(content, recipe).absolute()}\n{launcher}\n{' '.join([key, *modules])}\n")


if __name__ == "__main__":
    run_main(main)
