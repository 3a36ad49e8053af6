"""DeepSpeed's checkpoints restored, on another number of ranks too: by way of its universal checkpoint.

An ordinary checkpoint of ZeRO holds one piece of every optimizer state for each rank, and DeepSpeed refuses to load it
on more or fewer of them. The universal one holds whole states, a folder for each parameter.
"""

import logging
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
POLL_S = 0.2
LONGEST_S = 6 * 3600


def make_universal(saved: Path, tag: str, ranks: Ranks) -> Path:
    """The universal checkpoint beside ``saved``, converted by rank 0 if it is not there; every rank calls this.

    Args:
        saved: the folder that was given to ``DeepSpeedEngine.save_checkpoint``.
        tag: of that call.

    Raises:
        RuntimeError: if DeepSpeed cannot convert it.
        TimeoutError: if that takes longer than ``LONGEST_S``.
    """
    final = saved.with_name(f"{saved.name}-{UNIVERSAL}")
    failed = final.with_name(f"{final.name}.failed")
    if ranks.is_first:
        failed.unlink(missing_ok=True)
    if ranks.broadcast(final.exists()):
        return final
    if ranks.is_first:
        _convert(saved, tag, final, failed)
    # Not in a collective, whose time-out is that of a step: large models take longer.
    begin = time.monotonic()
    while not (final.exists() or failed.exists()):
        if time.monotonic() - begin > LONGEST_S:
            raise TimeoutError(f"rank 0 has not converted {saved} within {LONGEST_S} s")
        time.sleep(POLL_S)
    ranks.barrier()
    if failed.exists():
        raise RuntimeError(failed.read_text())
    return final


def _convert(saved: Path, tag: str, final: Path, failed: Path) -> None:
    """Make ``final``, or ``failed`` with the reason."""
    # A name of its own: what a rank that was killed had started may still be writing.
    temporary, begin = files.beside(final), time.monotonic()
    # AdamW keeps no count that the conversion needs in the place where it looks for it.
    command = [
        sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state",
        "--input_folder", str(saved / tag), "--output_folder", str(temporary / tag),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        files.write_text(failed, f"DeepSpeed cannot convert {saved / tag}: {said[-1]}")
    else:
        files.publish_folder(temporary, final)
        log.info("%s converted for another number of ranks in %.0f s", saved, time.monotonic() - begin)


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
