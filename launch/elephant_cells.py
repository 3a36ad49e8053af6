"""The recommenders of the Elephant's study: what each is trained with, and their training, several at a time.

OUT/TARGET/MODEL/chosen/FAMILY  the trainings by which a family's rate and deviation are chosen
OUT/TARGET/MODEL/VARIANT/seed-S a recommender
"""

import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import torch

from launch.elephant_claims import ranks_of
from launch.elephant_config import FURTHER, RANDOM, START, Cell, ElephantStudy, parts_of
from rec.config import RecConfig
from rec.job import RecJob
from rec.protocol import Protocol
from rec.runtime import files
from rec.runtime.config import build
from rec.runtime.errors import Diverged
from rec.runtime.logs import set_up_logging
from rec.runtime.memory import keep_freed_memory
from rec.runtime.parent import die_with_parent
from rec.train import run as train
from rec.trainer import FINISHED

log = logging.getLogger(__name__)


class Chosen(NamedTuple):
    """What validation says of a family: the learning rates, the best one first, and the vectors' deviation."""

    lrs: list[float]
    std: float | None


class Cells:
    """All of a study's recommenders.

    Args:
        study: the recipe.
        data: the prepared folder that they are trained on.
        out: the study's folder.
        protocols: under which the test items are ranked.
        vectors: gives the file of the vectors of a kind, of a RECFORMER.
    """

    def __init__(
        self,
        study: ElephantStudy,
        data: str,
        out: Path,
        protocols: Mapping[str, Protocol],
        vectors: Callable[[str, str], Path],
    ) -> None:
        self.study, self.data, self.out, self.protocols, self.vectors = study, data, out, protocols, vectors
        self.first = next(iter(study.recformers))

    def all(self) -> list[Cell]:
        """Every cell with its seeds; what needs no RECFORMER's own vectors is run for the first one alone."""
        return [
            Cell(model, variant, name, seed)
            for name in self.study.recformers
            for model in self.study.models
            for variant in self.study.variants
            if name == self.first or parts_of(variant)[1] in ("PT", "FT")
            for seed in (self.study.seeds if variant in self.study.headline.get(model, ()) else self.study.seeds[:1])
        ]

    def train(self, done: Callable[[], None]) -> list[Cell]:
        """Train what is not trained yet; the cells that have a recommender, in the order of ``all``.

        Args:
            done: called after every training.
        """
        cells = self.all()
        starts = {Cell(cell.model, START, cell.recformer, cell.seed) for cell in cells if cell.variant in FURTHER}
        first = [*cells, *sorted(starts.difference(cells))]
        for wave in (first, cells):
            own = [cell for cell in wave if (cell.variant in FURTHER) == (wave is cells) and self._can_start(cell)]
            families = dict.fromkeys((cell.model, parts_of(cell.variant)[0]) for cell in own)
            self._run([(choose, self._choice(*family)) for family in families], done)
            self._run([(train_cell, self._training(cell)) for cell in own], done)
        return [cell for cell in cells if (self.folder(cell) / FINISHED).exists()]

    def folder(self, cell: Cell) -> Path:
        """A cell's run folder."""
        name = cell.variant if cell.recformer == self.first else f"{cell.variant} {cell.recformer}"
        return self.out / cell.model / name.replace(" ", "-") / f"seed-{cell.seed}"

    def facts(self, cell: Cell) -> dict[str, Any]:
        """What a row of the table tells of a trained cell beside its figures."""
        result = files.read_json(self.folder(cell) / "result.json")
        chosen = files.read_json(self.folder(cell) / FINISHED)
        return {
            **cell._asdict(),
            "parameters": result["rows"][0]["parameters"],
            **{key: chosen[key] for key in ("lr", "std")},
            **{key: result["training"][key] for key in ("best_epoch", "epochs")},
        }

    def rec(self, cell: Cell, std: float | None = None) -> RecConfig:
        """How a cell is trained, but for its learning rate."""
        (how, what), study = parts_of(cell.variant), self.study
        items: dict[str, Any] = {"kind": "id"}
        if cell.variant != RANDOM:
            items = {"kind": "vectors", "trainable": how != "frozen"} if how != "id+" else {"kind": "id+vectors"}
            items |= {"file": str(self.vectors(what, cell.recformer)), "std": std, "projection": study.projection}
        content = study.models[cell.model].model_dump(mode="json") | {"items": items}
        content["train"] |= {"seed": cell.seed}
        if cell.variant in FURTHER:
            start = self.folder(cell._replace(variant=START))
            content["train"] |= {"start": str(start), "tune": FURTHER[cell.variant]}
        content["evaluate"] |= {"cutoffs": study.cutoffs, "cold_targets": study.cold_targets}
        return build(RecConfig, content)

    def _choice(self, model: str, family: str) -> tuple[RecConfig, str, Path, list[float], list[float | None]]:
        """What ``choose`` is asked of a family: it goes by the vectors that stand for all of its variants'."""
        own = [variant for variant in self.study.variants if parts_of(variant)[0] == family] or [START]
        preferred = [f"{family}{'' if family == 'id+' else ' '}{what}" for what in ("PT", "FT", "items")]
        variant = next((variant for variant in preferred if variant in own), own[0])
        cell = Cell(model, variant, self.first, self.study.seeds[0])
        stds = [self._std(model, family)] if family in (RANDOM, "further") else self.study.stds
        rec = self.rec(cell, stds[0])
        train = rec.train.model_copy(
            update={"epochs": min(self.study.rate_epochs or rec.train.epochs, rec.train.epochs)}
        )
        folder = self.out / model / "chosen" / family
        return rec.model_copy(update={"train": train}), self.data, folder, self.study.lrs, stds

    def _chosen(self, model: str, family: str) -> Chosen:
        return Chosen(**files.read_json(self.out / model / "chosen" / family / CHOSEN))

    def _std(self, model: str, family: str) -> float | None:
        return self._chosen(model, "frozen").std if family == "further" else self.study.stds[0]

    def _training(self, cell: Cell) -> tuple[RecJob, Chosen, Mapping[str, Protocol]]:
        chosen = self._chosen(cell.model, parts_of(cell.variant)[0])
        return RecJob(data=self.data, run=self.folder(cell), rec=self.rec(cell, chosen.std)), chosen, self.protocols

    def _can_start(self, cell: Cell) -> bool:
        """Whether what a cell trains further is there: it may have diverged."""
        starts = [cell._replace(variant=START, seed=seed) for seed in {cell.seed, self.study.seeds[0]}]
        return cell.variant not in FURTHER or all((self.folder(own) / FINISHED).exists() for own in starts)

    def _run(self, tasks: Sequence[tuple[Callable, tuple]], done: Callable[[], None]) -> None:
        """Call functions with their arguments, ``parallel`` at a time."""
        for _ in run_all(tasks, self.study.parallel, self.out / "cells.log"):
            done()


CHOSEN = "chosen.json"


def choose(rec: RecConfig, data: str, folder: Path, lrs: Sequence[float], stds: Sequence[float | None]) -> None:
    """Find the best rate at the first deviation, then the best deviation at that rate; kept in ``chosen.json``.

    A family that diverges at every rate has none.
    """
    if (folder / CHOSEN).exists():
        return
    order, std = list(lrs), stds[0]
    try:
        by_lr = _grid(rec, data, folder / "lr", "train.lr", lrs) if len(lrs) > 1 or len(stds) > 1 else {}
        order.sort(key=lambda lr: by_lr.get(lr, 0.0), reverse=True)
        if len(stds) > 1:  # the first of them has been tried, with the rates
            by_std = _grid(_at(rec, order[0]), data, folder / "std", "items.std", stds[1:])
            by_std = {std: by_lr[order[0]], **by_std}
            std = max(by_std, key=by_std.__getitem__)
    except Diverged as error:
        log.warning("%s is left out: %s", folder, error)
        order = []
    files.write_json(folder / CHOSEN, Chosen(order, std)._asdict())


def _grid(rec: RecConfig, data: str, run: Path, key: str, values: Sequence[Any]) -> dict[Any, float]:
    """Validation NDCG@10 by value; 0 where training diverged."""
    own = rec.model_copy(update={"grid": {key: list(values)}})
    train(RecJob(data=data, run=run, rec=own), f"recalign train {run}/config.yaml")
    found = files.read_json(run / FINISHED)["grid"]
    return {value: found[f"{key.rpartition('.')[2]}={value}"] for value in values}


def train_cell(job: RecJob, chosen: Chosen, protocols: Mapping[str, Protocol]) -> None:
    """Train one recommender at the best rate at which it does not diverge, and rank the test items.

    Where it diverges at all of them it is left out: there is then no finished run, and ``diverged.json`` beside it.
    """
    record = job.run.with_name(f"{job.run.name}-diverged.json")
    diverged = files.read_json(record) if record.exists() else []
    for lr in chosen.lrs:
        if lr in diverged:
            continue
        own = job.model_copy(update={"rec": _at(job.rec, lr)})
        log.info("%s, lr %g", job.run, lr)
        try:
            train(own, f"recalign train {job.run}/config.yaml")
            ranks_of(job.run, protocols)
        except Diverged as error:
            log.warning("%s is left out at lr %g: %s", job.run, lr, error)
            shutil.rmtree(job.run)
            diverged.append(lr)
            files.write_json(record, diverged)
            continue
        facts = files.read_json(job.run / FINISHED)
        files.write_json(job.run / FINISHED, {**facts, "lr": lr, "std": getattr(job.rec.items, "std", None)})
        return


def _at(rec: RecConfig, lr: float) -> RecConfig:
    return rec.model_copy(update={"train": rec.train.model_copy(update={"lr": lr})})


def run_all(tasks: Sequence[tuple[Callable, tuple]], processes: int, log_file: Path) -> Iterable[None]:
    """Call functions with their arguments, some at a time in processes of their own, and yield after each.

    Args:
        tasks: functions of modules, and their arguments.
        processes: how many; the cores are shared out over them. One: here, one after the other.
        log_file: where the processes write what they have to say.
    """
    if processes == 1 or len(tasks) < 2:
        for function, arguments in tasks:
            yield function(*arguments)
        return
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    with ProcessPoolExecutor(
        processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads, log_file)
    ) as pool:
        futures = [pool.submit(function, *arguments) for function, arguments in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _begin(threads: int, log_file: Path) -> None:
    die_with_parent()
    torch.set_num_threads(threads)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    set_up_logging()
    keep_freed_memory()
