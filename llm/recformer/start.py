"""How the jobs of RECFORMER's stages start."""

import argparse
import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from llm.recformer.job import RecformerJob, load_job
from rec.runtime.errors import UserError
from rec.runtime.parent import die_with_parent_if_asked
from rec.runtime.ranks import left_together, lost_contact_is_named
from rec.runtime.runfolder import RunFolder

STARTED = "stage_started"


def run_stage(
    description: str, stage: Literal["pretrain", "finetune"], job_of: Callable[[RecformerJob], dict[str, Any]]
) -> None:
    """Parse ``--config recipe.yaml key=value …`` and run one stage in its run folder."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a recipe, or the config.yaml of a run folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"e.g. llm.recformer.{stage}.lr=1e-4")
    arguments = parser.parse_args()
    die_with_parent_if_asked()
    job = load_job(arguments.config, arguments.overrides)
    if getattr(job.settings, stage) is None:
        raise UserError(f"{arguments.config} has no llm.recformer.{stage} section: there is nothing to do")
    folder, first = RunFolder(job.run), int(os.environ.get("RANK", "0")) == 0
    # A predecessor that is being killed may hold the lock a little longer.
    with lost_contact_is_named(), folder.lock("trainer", wait_s=30) if first else contextlib.nullcontext():
        if first:
            folder.claim(job)
            folder.log(STARTED, title=stage)
        with left_together():
            job_of(job)
        if first:
            folder.log("stage", title=stage)
