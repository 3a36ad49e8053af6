"""For batch scripts: ``python -m launch.cluster.where RECIPE key=value`` prints what they need to know of a recipe.

Two lines: the run folder, and the accelerate file for several nodes.
"""

import sys
from importlib import resources
from pathlib import Path

from rec.runtime.config import apply_overrides, read_recipe
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.runfolder import is_run_config

# Overrides of an alignment's recipe where only the nodes will say how many processes there are: one divides any batch.
ONE_PROCESS = ("align.trainer.processes=1", "align.generator.processes=1")


def run_of(recipe: Path, overrides: list[str]) -> Path:
    """The run folder that a recipe of any kind names; of a run's own ``config.yaml``, where that lies now.

    Raises:
        UserError: if it names none.
    """
    here = [f"run={recipe.parent}"] if is_run_config(recipe) else []
    run = apply_overrides(read_recipe(recipe), [*here, *overrides]).get("run")
    if not run:
        raise UserError(f"missing key 'run' in {recipe}")
    return Path(str(run))


def main() -> None:
    """Entry of the module."""
    if len(sys.argv) < 2:
        raise UserError("which recipe? python -m launch.cluster.where RECIPE key=value")
    launcher = resources.files("launch.accelerate").joinpath("multi-node.yaml")
    sys.stdout.write(f"{run_of(Path(sys.argv[1]), sys.argv[2:]).absolute()}\n{launcher}\n")


if __name__ == "__main__":
    run_main(main)
