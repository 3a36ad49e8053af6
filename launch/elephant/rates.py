"""Which learning rate, and which deviation of the vectors, a family of the Elephant's variants is trained with.

Kept in ``chosen.json`` of the family's folder, with what validation said of every one that was tried; each trial is a
run folder beside it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rec.build import FINISHED, build_model
from rec.config import RecConfig
from rec.data.prepared import Prepared
from rec.runtime import files
from rec.runtime.errors import Diverged
from rec.runtime.runfolder import RunFolder
from rec.trainer import STOP_METRIC, train

log = logging.getLogger(__name__)

T = TypeVar("T")
CHOSEN = "chosen.json"


class Chosen(NamedTuple):
    """What validation says of a family: the learning rates, the best one first, and the vectors' deviation."""

    lrs: list[float]
    std: float | None


def load_chosen(folder: Path) -> Chosen:
    """What ``choose`` left in a family's folder."""
    found = files.read_json(folder / CHOSEN)
    return Chosen(*(found[name] for name in Chosen._fields))


def choose(
    rec: RecConfig,
    data: str,
    folder: Path,
    lrs: Sequence[float],
    stds: Sequence[float | None],
    epochs: int | None = None,
) -> None:
    """Find the best rate at the first deviation, the best deviation at that rate, and the best rate at that deviation.

    A family that diverges at every rate that was tried has none.

    Args:
        rec: how a trial is trained, but for what is looked for.
        data: the prepared folder.
        folder: of the family.
        lrs: the rates that there are to choose from.
        stds: the deviations of the vectors.
        epochs: after which a trial ends, and is worth what validation says of it then: where vectors are a recommender
            before they are trained, the best of so few epochs would be the same untrained one for all. Null: a trial is
            a whole training, and worth its best epoch.
    """
    if (folder / CHOSEN).exists():
        return
    if len(lrs) == len(stds) == 1:
        files.write_json(RunFolder(folder).path / CHOSEN, Chosen(list(lrs), stds[0])._asdict())
        return
    prepared = Prepared.load(Path(data))
    if epochs is not None:
        rec = _at(rec, "train", epochs=min(epochs, rec.train.epochs))

    found: dict[tuple[float, float | None], float] = {}

    def judge(lr: float, std: float | None) -> float:
        if (lr, std) not in found:
            own, name = at_rate(rec, lr), f"lr={lr}"
            if std != stds[0]:
                own, name = _at(own, "items", std=std), f"{name}-std={std}"
            found[lr, std] = _valid(own, prepared, RunFolder(folder / name), at_end=epochs is not None)
        return found[lr, std]

    lr = _best(climb(lrs, lambda lr: judge(lr, stds[0])))
    std = _best({std: judge(lr, std) for std in stds}) if judge(lr, stds[0]) else stds[0]
    by_lr = climb(lrs, lambda lr: judge(lr, std), lr if std != stds[0] else None)
    lr = _best(by_lr)
    # Those that were not tried come last: a training that diverges at the best takes the next.
    rest = sorted((other for other in lrs if other != lr), key=lambda lr: by_lr.get(lr, -1.0), reverse=True)
    chosen = Chosen([lr, *rest] if by_lr[lr] else [], std)
    tried = [(*settings, worth) for settings, worth in found.items()]
    files.write_json(folder / CHOSEN, chosen._asdict() | {"tried": tried})


def climb(values: Sequence[float], judge: Callable[[float], float], start: float | None = None) -> dict[float, float]:
    """The values that were judged, with what they are worth: from two neighbours on outwards, to the top.

    A worth of 0 is no worth at all: smaller values are then tried to the last.

    Args:
        values: any number of them; their worth is taken to rise to one peak, and to fall after it.
        judge: tells what one is worth.
        start: the lower of the two; null for the two in the middle.
    """
    ordered = sorted(values)
    first = (len(ordered) - 1) // 2 if start is None else ordered.index(start)
    found = {value: judge(value) for value in ordered[first : first + 2]}
    best = _best(found)
    step = 1 if best > ordered[first] else -1
    place = ordered.index(best) + step
    while 0 <= place < len(ordered):
        value = ordered[place]
        found[value] = judge(value)
        if found[value] <= found[best] > 0:
            break
        best, place = value, place + step
    return found


def _best(worth: Mapping[T, float]) -> T:
    """The key with the most; the first of several."""
    return max(worth, key=worth.__getitem__)


def at_rate(rec: RecConfig, lr: float) -> RecConfig:
    """The same training at another learning rate."""
    return _at(rec, "train", lr=lr)


def _at(rec: RecConfig, section: str, **changes: Any) -> RecConfig:
    return rec.model_copy(update={section: getattr(rec, section).model_copy(update=changes)})


def _valid(rec: RecConfig, data: Prepared, run: RunFolder, at_end: bool) -> float:
    """Validation NDCG@10 of the last epoch or of the best; 0 where training diverges."""
    try:
        train(build_model(rec, data), data, rec, run, f"{rec.model.name} {run.path.name}")
    except Diverged as error:
        log.warning("%s is out: %s", run.path, error)
        return 0.0
    if at_end:
        return run.events("epoch")[-1][STOP_METRIC]
    return files.read_json(run.path / FINISHED)[f"valid_{STOP_METRIC}"]
