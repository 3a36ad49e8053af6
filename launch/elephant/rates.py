"""Which learning rate, and which deviation of the vectors, a family of the Elephant's variants is trained with.

Kept in ``chosen.json`` of the family's folder, with what validation said of every one that was tried; each trial is a
run folder beside it.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rec.build import FINISHED, build_model
from rec.config import RecConfig
from rec.data.prepared import Prepared
from rec.runtime import files
from rec.runtime.errors import Diverged
from rec.runtime.runfolder import RunFolder
from rec.trainer import STOP_METRIC, train

log = logging.getLogger(__name__)

CHOSEN = "chosen.json"


class Chosen(NamedTuple):
    """What validation says of a family: the learning rates, the best one first, and the vectors' deviation."""

    lrs: list[float]
    std: float | None


def load_chosen(folder: Path) -> Chosen:
    """What ``choose`` left in a family's folder."""
    found = files.read_json(folder / CHOSEN)
    return Chosen(*(found[name] for name in Chosen._fields))


def choose(rec: RecConfig, data: str, folder: Path, lrs: Sequence[float], stds: Sequence[float | None]) -> None:
    """Find the best rate at the first deviation, then the best deviation at that rate.

    A family that diverges at every rate that was tried has none.
    """
    if (folder / CHOSEN).exists():
        return
    if len(lrs) == len(stds) == 1:
        files.write_json(RunFolder(folder).path / CHOSEN, Chosen(list(lrs), stds[0])._asdict())
        return
    prepared = Prepared.load(Path(data))

    def judge(key: str, value: float | None, own: RecConfig) -> float:
        return _valid(own, prepared, RunFolder(folder / f"{key}={value}"))

    by_lr = climb(lrs, lambda lr: judge("lr", lr, at_rate(rec, lr)))
    best = max(by_lr, key=by_lr.__getitem__)
    by_std = {stds[0]: by_lr[best]}
    for std in stds[1:] if by_lr[best] else ():
        by_std[std] = judge("std", std, _at(at_rate(rec, best), "items", std=std))
    # Those that were not tried come last: a training that diverges at the best takes the next.
    rest = sorted((lr for lr in lrs if lr != best), key=lambda lr: by_lr.get(lr, -1.0), reverse=True)
    order = [best, *rest] if by_lr[best] else []
    chosen = Chosen(order, max(by_std, key=by_std.__getitem__))
    tried = {"by_lr": [*by_lr.items()], "by_std": [*by_std.items()]}
    files.write_json(folder / CHOSEN, chosen._asdict() | tried)


def climb(values: Sequence[float], judge: Callable[[float], float]) -> dict[float, float]:
    """The values that were judged, with what they are worth: from the two in the middle on outwards, to the top.

    A worth of 0 is no worth at all: smaller values are then tried to the last.

    Args:
        values: any number of them; their worth is taken to rise to one peak, and to fall after it.
        judge: tells what one is worth.
    """
    ordered = sorted(values)
    middle = (len(ordered) - 1) // 2
    found = {value: judge(value) for value in ordered[middle : middle + 2]}
    best = max(found, key=found.__getitem__)
    step = 1 if best > ordered[middle] else -1
    place = ordered.index(best) + step
    while 0 <= place < len(ordered):
        value = ordered[place]
        found[value] = judge(value)
        if found[value] <= found[best] > 0:
            break
        best, place = value, place + step
    return found


def at_rate(rec: RecConfig, lr: float) -> RecConfig:
    """The same training at another learning rate."""
    return _at(rec, "train", lr=lr)


def _at(rec: RecConfig, section: str, **changes: Any) -> RecConfig:
    return rec.model_copy(update={section: getattr(rec, section).model_copy(update=changes)})


def _valid(rec: RecConfig, data: Prepared, run: RunFolder) -> float:
    """Validation NDCG@10; 0 where training diverges."""
    try:
        train(build_model(rec, data), data, rec, run, f"{rec.model.name} {run.path.name}")
    except Diverged as error:
        log.warning("%s is out: %s", run.path, error)
        return 0.0
    return files.read_json(run.path / FINISHED)[f"valid_{STOP_METRIC}"]
