"""The Elephant's study: behaviour-tuned item vectors as the initial table of plain recommenders (sections 4.1 to 4.5).

``recalign reproduce elephant-…``. Every part is a run folder of its own, made by the code that ``recalign pretrain``,
``recalign vectors`` and ``recalign train`` run, so an interrupted study goes on where it was:

    OUT/pretrained-HASH             stage-PT, shared by all targets and variants that have it in common
    OUT/TARGET/finetuned/NAME       stage-FT1 and FT2 of one RECFORMER
    OUT/TARGET/vectors/…            what recommenders begin with
    OUT/TARGET/MODEL/VARIANT/seed-S a recommender
"""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch import recformer, vectors
from launch.elephant import attention, claims, sizes
from launch.elephant.cells import Cells
from launch.elephant.claims import ranks_of
from launch.elephant.config import OWN, RANDOM, Cell, ElephantStudy, parts_of
from llm.fingerprint import fingerprint
from llm.recformer.config import RecformerSettings
from llm.recformer.job import FINISHED, RecformerJob
from llm.recformer.model import resolve, width_of
from llm.recformer.text import text_columns
from rec.data.prepared import Prepared
from rec.evaluation import Metrics, load_ranks, require_cutoffs
from rec.items import require_components
from rec.negatives import require_negatives
from rec.protocol import Protocol, preset
from rec.runtime import files
from rec.runtime.config import apply_overrides, build, hash_of, leave_out_nulls, read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder


class ElephantRun:
    """One study in its run folder.

    Args:
        path: its recipe.
        overrides: ``key=value`` of the study.

    Raises:
        UserError: if any of its recipes is impossible; before any of them runs.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        study = _read(path, overrides)
        self.study = study = _read(path, [*study.for_target.get(study.target, ()), *overrides])
        self.data = study.targets.get(study.target, study.target)
        self.out = study.run / Path(study.target).name
        self.settings = {name: self._settings(changes) for name, changes in study.recformers.items()}
        self.protocols: dict[str, Protocol] = {
            name: preset(name).model_copy(update={"cutoffs": tuple(study.cutoffs), "cold_targets": study.cold_targets})
            for name in study.protocols
        }
        self.first = next(iter(study.recformers))
        self.cells = Cells(study, self.data, self.out, self.protocols, self._vectors_path)
        for cell in self.cells.all():
            self._source(parts_of(cell.variant)[1], cell.recformer)
            self.cells.rec(cell)

    def execute(self, command: str) -> dict[str, Any]:
        """Run what is not done yet; the content of ``result.json``.

        Raises:
            UserError: if the data or the backbone does not fit the recipe; before anything is trained.
        """
        folder = RunFolder(self.out)
        RunFolder(self.study.run)
        with folder.lock("launcher"):
            folder.check(self.study)
            self._check()
            folder.claim(self.study)
            rows = [row for name in self.settings for row in self._recformer_rows(name)]
            watch = _Watch(folder)
            for cell in self.cells.all():
                self._make_vectors(cell)
            watch.count()
            cells = self.cells.train(watch.count)
            ranks = {cell: ranks_of(self.cells.folder(cell), self.protocols) for cell in cells}
            target = Prepared.load(Path(self.data))
            protocols = {name: protocol.of_run(target, "train") for name, protocol in self.protocols.items()}
            rows += [
                {**self.cells.facts(cell), "protocol": protocol, "protocol_hash": protocols[protocol].hash}
                | metrics.summary()
                for cell, found in ranks.items()
                for protocol, metrics in found.items()
            ]
            ranks |= self._recformer_ranks()
            serving = claims.serving({cell: self.cells.folder(cell) for cell in cells})
            figures = self._attention()
            described = {name: protocol.described() for name, protocol in protocols.items()}
            summed = claims.means(rows)
            sizes.draw(self.out, summed, self._users())
            held = claims.claims(ranks, serving, self.first, self.study.margin)
            watch.count()
            return folder.write_result(
                command,
                hash_of(self.study),
                {"hash": hash_of([protocol.hash for protocol in protocols.values()]), **described},
                rows,
                self._recformer_s() + sum(row["seconds"] for row in folder.events("studied")),
                held,
                means=summed,
                data={
                    "name": self.data,
                    "content_hash": target.meta["content_hash"],
                    **target.meta["counts"],
                },
                diverged=[cell._asdict() for cell in self.cells.all() if cell not in ranks],
                serving=serving,
                attention=figures,
                speed={name: self._speed(name) for name in self.settings},
            )

    def _check(self) -> None:
        """Raise a UserError for what would only fail after hours."""
        sources = {name for own in self.settings.values() if own.pretrain for name in own.pretrain.sources}
        found = {name: Prepared.load(Path(name)) for name in sorted({self.data, *sources})}
        target = found[self.data]
        for protocol in self.protocols.values():
            require_cutoffs(protocol, target, "cutoffs")
            require_negatives(protocol, target, "test")
        kinds = {parts_of(variant)[1] for variant in self.study.variants if variant != RANDOM}
        for name, own in self.settings.items():
            reads_target = own.finetune is not None or kinds.intersection(OWN)
            for read in (*([self.data] if reads_target else ()), *(own.pretrain.sources if own.pretrain else ())):
                text_columns(found[read], own.text)
            if kinds.intersection(OWN):
                self._check_width(name, width_of(own.backbone), target.n_items)
            if "vanilla" in kinds:
                vectors.require_untuned(own.backbone)
        for name in kinds.intersection(self.study.more):
            width = vectors.width_of_source(self.study.more[name], target, self.study.item_text)
            self._check_width(name, width, target.n_items)
        more = {name: vectors.hash_of_source(source) for name, source in self.study.more.items()}
        backbones = {own.backbone: fingerprint(resolve(own.backbone)) for own in self.settings.values()}
        hashes = {name: data.meta["content_hash"] for name, data in found.items()}
        RunFolder(self.out).require_the_same_inputs({"data": hashes, "backbones": backbones, "more": more})

    def _check_width(self, name: str, width: int, items: int) -> None:
        for model, rec in self.study.models.items():
            if self.study.pca:
                require_components(items, width, rec.model.dim, f"{name}, models.{model}")
            elif rec.model.dim != width and not self.study.projection:
                raise UserError(
                    f"the vectors of {name} have width {width}, the dim of models.{model} is {rec.model.dim}: set"
                    f" models.{model}.model.dim={width}, or projection=true to learn a map between them, or (for a"
                    " narrower model) pca=true to begin with their first principal components"
                )

    def _settings(self, changes: Sequence[str]) -> RecformerSettings:
        content = apply_overrides(self.study.recformer.model_dump(mode="json"), changes)
        if (own := content.get("finetune")) is not None:  # judged as the recommenders are
            own |= {"protocols": self.study.protocols, "cold_targets": self.study.cold_targets}
            judged = {"cutoffs": self.study.cutoffs, "cold_targets": self.study.cold_targets}
            own["evaluate"] = (own.get("evaluate") or {}) | judged
        return build(RecformerSettings, content)

    # stage-PT, FT1, FT2

    def _pretraining(self, name: str) -> RecformerJob | None:
        settings = self.settings[name]
        if settings.pretrain is None:
            return None
        own = settings.model_copy(update={"finetune": None})
        content = {"data": (own.pretrain.sources or [self.data])[0], "run": "-", "llm": {"recformer": own.model_dump()}}
        job = build(RecformerJob, content)
        mark = hash_of([job.identity("pretrain"), own.pretrain.sources or [self.data]])
        folder = self.study.pretrained or self.study.run
        return job.model_copy(update={"run": folder / f"pretrained-{mark[:8]}"})

    def _finetuning(self, name: str) -> RecformerJob | None:
        settings, before = self.settings[name], self._pretraining(name)
        if settings.finetune is None:
            return None
        backbone = settings.backbone if before is None else str(before.pretrain_folder / "model")
        update = {"pretrain": None, "backbone": backbone}
        own = settings.model_copy(update=update).model_dump()
        content = {"data": self.data, "run": str(self.out / "finetuned" / name), "llm": {"recformer": own}}
        return build(RecformerJob, content)

    def _recformer_rows(self, name: str) -> list[dict[str, Any]]:
        """Train what is not trained yet of one RECFORMER; its figures."""
        rows: list[dict[str, Any]] = []
        for job in (self._pretraining(name), self._finetuning(name)):
            if job is not None:
                self._share_first_stage(name, job)
                result = recformer.run(job, f"recalign pretrain {job.run}/config.yaml")
                rows += [{**row, "recformer": name, "seed": self.study.seeds[0]} for row in result["rows"]]
        return [row | {"variant": f"RECFORMER {row['stage']}"} for row in rows]

    def _share_first_stage(self, name: str, job: RecformerJob) -> None:
        """Copy stage-FT1 from a RECFORMER that differs in stage-FT2 alone."""
        own = job.finetune_folder / "FT1"
        if job.settings.finetune is None or own.exists():
            return
        for other in self.settings:
            before = self._finetuning(other)
            if other == name or _first_stage(before) != _first_stage(job):
                continue
            source = before.finetune_folder / "FT1"
            if (source / FINISHED).exists():
                temporary = own.with_name(f"{files.TEMPORARY_PREFIX}FT1")
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(source, temporary)
                temporary.rename(own)
                return

    def _speed(self, name: str) -> dict[str, Any]:
        jobs = [job for job in (self._pretraining(name), self._finetuning(name)) if job is not None]
        return {key: value for job in jobs for key, value in recformer.speed_of(RunFolder(job.run)).items()}

    def _recformer_s(self) -> float:
        """Seconds that the RECFORMERs took, those too that another study trained."""
        runs = {job.run for name in self.settings for job in (self._pretraining(name), self._finetuning(name)) if job}
        return sum(RunFolder(run).result()["wall_s"] for run in runs)

    def _recformer_ranks(self) -> dict[Cell, dict[str, Metrics]]:
        """The ranks of the test items by the RECFORMERs themselves, after stage-FT2."""
        found = {}
        for name in self.settings:
            if (job := self._finetuning(name)) is not None:
                folder = job.finetune_folder / "FT2"
                found[Cell("RECFORMER", "RECFORMER FT2", name, self.study.seeds[0])] = {
                    protocol: load_ranks(folder / f"ranks-{protocol}.safetensors", tuple(self.study.cutoffs))
                    for protocol in self.protocols
                }
        return found

    def _vectors_path(self, what: str, name: str) -> Path:
        owner = self._owner(what, name)
        return self.out / "vectors" / f"{what}{f' {owner}' if owner != self.first else ''}.safetensors"

    def _owner(self, what: str, name: str) -> str:
        """The first RECFORMER whose vectors of a kind are those of ``name``."""

        def made_of(other: str) -> Any:
            if what == "PT":
                return (before := self._pretraining(other)) and before.run
            if what == "FT":
                return _first_stage(self._finetuning(other))
            return _untuned(self.settings[other]) if what == "vanilla" else None

        return next(other for other in self.settings if made_of(other) == made_of(name))

    def _source(self, what: str, name: str) -> str | None:
        """What the vectors called ``what`` are made from; None for a variant that has none."""
        if not what:
            return None
        if what in self.study.more:
            return self.study.more[what]
        # An untuned one is any job's: the backbone as RECFORMER reads it.
        job = self._finetuning(name) if what == "FT" else self._pretraining(name) or self._finetuning(name)
        if job is None or (what == "PT" and job.settings.pretrain is None):
            raise UserError(
                f"variants with {what} vectors need recformer.{'finetune' if what == 'FT' else 'pretrain'}"
                f" ({name} has none)"
            )
        return str(job.run)

    def _make_vectors(self, cell: Cell) -> None:
        """Write the file that a cell begins with, unless it is there."""
        what = parts_of(cell.variant)[1]
        source, path = self._source(what, cell.recformer), self._vectors_path(what, cell.recformer)
        if source is None or path.exists():
            return
        if what in self.study.more:
            vectors.write(source, Path(self.data), path, item_text=self.study.item_text)
        else:
            vectors.write(source, Path(self.data), path, what)

    def _attention(self) -> dict[str, Any] | None:
        """Fig. 1: the first RECFORMER's maps beside its backbone's."""
        job, before = self._finetuning(self.first), self._pretraining(self.first)
        if job is None or before is None:
            return None
        tuned = job.finetune_folder / "FT1" / "model"
        return attention.analyse(before.settings, tuned, job.open(self.data), job.tokens, self.out)

    def _users(self) -> dict[str, int]:
        """How many users stage-PT of every RECFORMER saw."""
        jobs = {name: self._pretraining(name) for name in self.settings}
        facts = {name: job.pretrain_folder / FINISHED for name, job in jobs.items() if job is not None}
        return {name: files.read_json(path)["users"] for name, path in facts.items()}


class _Watch:
    """Logs the seconds that a study takes, bit by bit, so that one that is killed keeps what it had spent."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.begin = folder, time.monotonic()

    def count(self) -> None:
        """Log the seconds since the last call."""
        now = time.monotonic()
        self.folder.log("studied", seconds=round(now - self.begin, 1))
        self.begin = now


def _read(path: Path, overrides: Sequence[str]) -> ElephantStudy:
    """The recipe; a model that an override leaves out takes its headline with it."""
    recipe = read_recipe(path)
    content = leave_out_nulls(apply_overrides(recipe, overrides), recipe, "models")
    if isinstance(headline := content.get("headline"), dict):
        gone = set(recipe.get("models") or {}) - set(content.get("models") or {})
        content["headline"] = {name: own for name, own in headline.items() if name not in gone}
    return build(ElephantStudy, content)


def _untuned(settings: RecformerSettings) -> str:
    """A hash of what decides the vectors of the backbone as RECFORMER reads it."""
    content = settings.model_dump(mode="json", include={"backbone", "text", "size"})
    return hash_of([content, settings.pretrain.seed if settings.pretrain else None])


def _first_stage(job: RecformerJob | None) -> str | None:
    """A hash of what decides stage-FT1 alone; None where there is none."""
    if job is None:
        return None
    content = json.loads(job.settings.model_dump_json(exclude={"processes", "zero_stage"}))
    for key in ("fixed_epochs", "train_table", "table_lr"):
        (content["finetune"] or {}).pop(key, None)
    return hash_of([content, job.data])
