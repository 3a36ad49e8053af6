"""How both jobs start: their one argument, and dying with whoever started them."""

import argparse
from pathlib import Path

from align.config import MainJob, load_job
from rec.runtime.parent import die_with_parent_if_asked


def read_arguments(description: str, replay: bool = False) -> tuple[MainJob, argparse.Namespace]:
    """Parse ``--config recipe.yaml key=value …`` and tie this process to its parent if that asked for it.

    ``replay`` adds ``--replay-into``, which is None where it is not given.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a recipe, or the config.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. align.trainer.lr=1e-5")
    if replay:
        parser.add_argument(
            "--replay-into",
            type=Path,
            metavar="DIR",
            help="train again on the run's sample log, writing to this folder",
        )
    arguments = parser.parse_args()
    die_with_parent_if_asked()
    return load_job(arguments.config, arguments.overrides), arguments
