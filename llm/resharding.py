"""DeepSpeed's checkpoints restored, on another number of ranks too: by way of its universal checkpoint.

An ordinary checkpoint of ZeRO holds one piece of every optimizer state for each rank, and DeepSpeed refuses to load it
on more or fewer of them. The universal one holds whole states, a folder for each parameter.
"""

import logging
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from rec.runtime import files
from rec.runtime.ranks import Ranks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

log = logging.getLogger(__name__)

UNIVERSAL = "universal"


def make_universal(saved: Path, tag: str, ranks: Ranks) -> Path:
    """The universal checkpoint beside ``saved``, converted by rank 0 if it is not there; every rank calls this.

    Args:
        saved: the folder that was given to ``DeepSpeedEngine.save_checkpoint``.
        tag: of that call.

    Raises:
        RuntimeError: if DeepSpeed cannot convert it.
    """
    final, problem = saved.with_name(f"{saved.name}-{UNIVERSAL}"), None
    if ranks.is_first and not final.exists():
        temporary, begin = saved.with_name(f"{files.TEMPORARY_PREFIX}{final.name}"), time.monotonic()
        shutil.rmtree(temporary, ignore_errors=True)
        # AdamW keeps no count that the conversion needs in the place where it looks for it.
        command = [
            sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
            "--input_folder", str(saved / tag), "--output_folder", str(temporary / tag),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            problem = f"DeepSpeed cannot convert {saved / tag}: {said[-1]}"
        else:
            files.publish_folder(temporary, final)
            log.info("%s converted for another number of ranks in %.0f s", saved, time.monotonic() - begin)
    problem = ranks.broadcast(problem)
    if problem:
        raise RuntimeError(problem)
    return final


def restore(engine: "DeepSpeedEngine", saved: Path, tag: str, world_size: int, strict: bool = True) -> None:
    """Restore what ``world_size`` ranks wrote; every rank calls this.

    Args:
        engine: as it was when it saved, but for the number of ranks.
        saved: the folder that was given to ``DeepSpeedEngine.save_checkpoint``.
        tag: of that call.
        world_size: how many ranks made that call.
        strict: whether all parameters of the module were saved.
    """
    ranks = Ranks.current()
    if world_size == ranks.size:
        loaded, _ = engine.load_checkpoint(str(saved), tag=tag, load_module_strict=strict)
    else:
        loaded = load_universal(engine, make_universal(saved, tag, ranks), tag)
    if loaded is None:
        raise RuntimeError(f"DeepSpeed found nothing to load in {saved}")


def load_universal(engine: "DeepSpeedEngine", folder: Path, tag: str) -> str | None:
    """Restore what ``make_universal`` wrote; every rank calls this. Returns None if there was nothing.

    The engine saves and loads ordinary checkpoints afterwards, as before.
    """
    optimizer = engine.optimizer.optimizer
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    # DeepSpeed reads this when it loads; in its configuration file it would hold for every later checkpoint too.
    engine._config.load_universal_checkpoint = True
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=tag)
    finally:
        engine._config.load_universal_checkpoint = False
    # Under ZeRO-3 DeepSpeed gives all parameter groups the settings of the first one, weight decay among them, and one
    # count of steps, which each of them then raises in place.
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    return loaded
