"""The recommenders of the Elephant's study: what each is trained with, and their training, several at a time.

OUT/TARGET/MODEL/chosen/FAMILY  the trainings by which a family's rate and deviation are chosen
OUT/TARGET/MODEL/VARIANT/seed-S a recommender
"""

import logging
import shutil
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from launch import task_pool
from launch.elephant import rates
from launch.elephant.claims import ranks_of
from launch.elephant.config import FURTHER, RANDOM, START, Cell, ElephantStudy, family_of, parts_of
from launch.elephant.rates import Chosen
from launch.task_pool import Task
from rec.build import FINISHED
from rec.config import RecConfig
from rec.job import RecJob
from rec.protocol import Protocol
from rec.runtime import files
from rec.runtime.config import build
from rec.runtime.errors import Diverged
from rec.train import run as train

log = logging.getLogger(__name__)


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
        """Every cell with its seeds; those that begin with the same vectors are run for the first RECFORMER alone."""
        found: dict[tuple[str, str, Path], str] = {}
        for name in self.study.recformers:
            for model in self.study.models:
                for variant in self.study.variants:
                    found.setdefault((model, variant, self.vectors(parts_of(variant)[1], name)), name)
        return [
            Cell(model, variant, name, seed)
            for (model, variant, _), name in found.items()
            for seed in (self.study.seeds if variant in self.study.headline.get(model, ()) else self.study.seeds[:1])
        ]

    def train(self, done: Callable[[], None]) -> list[Cell]:
        """Train what is not trained yet; the cells that have a recommender, in the order of ``all``.

        The whole table is trained with the first seed before any of it is with another.

        Args:
            done: called after every training.
        """
        cells = self.all()
        tasks: dict[Hashable, Task] = {}
        by_seed = sorted(cells, key=lambda cell: self.study.seeds.index(cell.seed))
        for cell in [*by_seed, *(start for own in by_seed for start in self._starts(own))]:
            family = (cell.model, family_of(cell.variant))
            tasks.setdefault(family, Task(self._starts(self._stands_for(*family)), partial(self._choice, *family)))
            tasks[cell] = Task([family, *self._starts(cell)], partial(self._training, cell))
        for _ in task_pool.run_all(tasks, self.study.parallel, self.out / "cells.log"):
            done()
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
            items |= {"file": str(self.vectors(what, cell.recformer)), "std": std}
            items |= {"projection": study.projection, "pca": study.pca}
        content = study.models[cell.model].model_dump(mode="json") | {"items": items}
        content["train"] |= {"seed": cell.seed}
        if cell.variant in FURTHER:
            start = self.folder(cell._replace(variant=START))
            content["train"] |= {"start": str(start), "tune": FURTHER[cell.variant]}
        content["evaluate"] |= {"cutoffs": study.cutoffs, "cold_targets": study.cold_targets}
        return build(RecConfig, content)

    def _starts(self, cell: Cell) -> list[Cell]:
        """What a cell trains further, and what its family's rate is chosen by."""
        if cell.variant not in FURTHER:
            return []
        return [cell._replace(variant=START, seed=seed) for seed in dict.fromkeys((self.study.seeds[0], cell.seed))]

    def _can_start(self, cell: Cell) -> bool:
        """Whether what a cell trains further is there: it may have diverged."""
        return all((self.folder(start) / FINISHED).exists() for start in self._starts(cell))

    def _stands_for(self, model: str, family: str) -> Cell:
        """The cell by which a family's rate and deviation are chosen."""
        own = [variant for variant in self.study.variants if family_of(variant) == family] or [START]
        preferred = [variant for what in ("PT", "FT") for variant in own if parts_of(variant)[1] == what]
        return Cell(model, [*preferred, *own][0], self.first, self.study.seeds[0])

    def _choice(self, model: str, family: str) -> tuple[Callable, tuple] | None:
        cell = self._stands_for(model, family)
        if not self._can_start(cell):
            return None
        has_own = family != RANDOM and family not in FURTHER
        stds = self.study.stds if has_own else [self._std(model, family)]
        folder, study = self._chosen_folder(model, family), self.study
        return rates.choose, (self.rec(cell, stds[0]), self.data, folder, study.lrs, stds, study.rate_epochs)

    def _chosen_folder(self, model: str, family: str) -> Path:
        return self.out / model / "chosen" / family.replace(" ", "-")

    def _std(self, model: str, family: str) -> float | None:
        """The deviation of a family that has none to choose: that of what it trains further, if it does."""
        if family in FURTHER:
            return rates.load_chosen(self._chosen_folder(model, family_of(START))).std
        return self.study.stds[0]

    def _training(self, cell: Cell) -> tuple[Callable, tuple] | None:
        if not self._can_start(cell):
            return None
        chosen = rates.load_chosen(self._chosen_folder(cell.model, family_of(cell.variant)))
        job = RecJob(data=self.data, run=self.folder(cell), rec=self.rec(cell, chosen.std))
        return train_cell, (job, chosen, self.protocols)


def train_cell(job: RecJob, chosen: Chosen, protocols: Mapping[str, Protocol]) -> None:
    """Train one recommender at the best rate at which it does not diverge, and rank the test items.

    Where it diverges at all of them it is left out: there is then no finished run, and ``diverged.json`` beside it.
    """
    record = job.run.with_name(f"{job.run.name}-diverged.json")
    diverged = files.read_json(record) if record.exists() else []
    for lr in chosen.lrs:
        if lr in diverged:
            continue
        own = job.model_copy(update={"rec": rates.at_rate(job.rec, lr)})
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
