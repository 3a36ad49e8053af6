"""What every job under ``accelerate launch`` has to see to before its accelerator, whichever paper it is of."""

import json
import os
import sys
from importlib import resources
from pathlib import Path
from typing import Any

from rec.runtime.errors import UserError


def shipped_deepspeed(zero_stage: int, clip_norm: float, offload: bool = False) -> dict[str, Any]:
    """The shipped DeepSpeed JSON of a stage, with the clipping that DeepSpeed would otherwise leave out."""
    name = f"zero{zero_stage}{'_offload' if offload else ''}.json"
    content = json.loads(resources.files("ds_configs").joinpath(name).read_text())
    content["gradient_clipping"] = clip_norm
    return content


def use_own_ninja() -> None:
    """DeepSpeed compiles with the first ninja it finds, and two versions of it rebuild each other's work every time."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"


def require_processes(key: str, wanted: int, started: int) -> None:
    """Raise a UserError if another number of processes was ``started`` than the recipe's ``key`` says."""
    if started != wanted:
        raise UserError(
            f"{key} is {wanted}, but {started} were started; give accelerate launch the same --num_processes"
        )
