"""The Elephant's study: behaviour-tuned item vectors as the initial table of plain recommenders (sections 4.1 to 4.5).

``recalign reproduce elephant-…``. Every part is a run folder of its own, made by the code that ``recalign pretrain``,
``recalign vectors`` and ``recalign train`` run, so an interrupted study goes on where it was:

    OUT/pretrained-HASH             stage-PT, shared by all targets and variants that have it in common
    OUT/TARGET/finetuned/NAME       stage-FT1 and FT2 of one RECFORMER
    OUT/TARGET/vectors/…            what recommenders begin with
    OUT/TARGET/MODEL/VARIANT/seed-S a recommender
"""

import json
import logging
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from launch import elephant_attention, elephant_claims, elephant_sizes, recformer, vectors
from llm.recformer.config import RecformerSettings
from llm.recformer.job import RecformerJob
from rec.config import RecConfig
from rec.evaluation import Metrics
from rec.job import RecJob
from rec.protocol import PRESETS, Protocol, preset
from rec.runtime import files
from rec.runtime.config import Section, apply_overrides, build, hash_of, read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder
from rec.train import run as train

log = logging.getLogger(__name__)

OWN = ("vanilla", "PT", "FT")
RANDOM, START = "random", "frozen FT"
FURTHER: dict[str, Literal["all", "items"]] = {"further all": "all", "further items": "items"}
TABLE_3 = [RANDOM, *(f"{how} {what}" for how in ("frozen", "trainable") for what in OWN), *FURTHER]


class ElephantStudy(Section):
    """The recipe of such a study."""

    run: Path
    """The run folder."""
    target: str
    """One of ``targets``, or a prepared folder."""
    targets: dict[str, str] = Field(default_factory=dict)
    """Prepared folders by name."""
    recformer: RecformerSettings
    """The ``llm.recformer`` section; its pretrain section names the sources."""
    recformers: dict[str, list[str]] = Field({"RECFORMER": []}, min_length=1)
    """Overrides of that section by a name; variants that need none of them are run for the first one alone."""
    models: dict[str, RecConfig] = Field(default_factory=dict)
    """The ``rec`` section of every plain recommender, by a name; its items are the variants'."""
    variants: list[str] = Field(default_factory=lambda: list(TABLE_3))
    """``random``; ``frozen X``, ``trainable X`` and ``id+X`` for X of vanilla, PT, FT and the names of ``more``;
    ``further all`` and ``further items``, which start from ``frozen FT``."""
    more: dict[str, str] = Field(default_factory=dict)
    """More item vectors: what ``recalign vectors`` takes (an LMRec's run, a sentence encoder), by a name."""
    item_text: str = "{title}"
    """Template of an item's text for ``more``."""
    lrs: list[float] = Field([3e-4, 1e-3, 3e-3, 1e-2], min_length=1)
    """Learning rates; each variant's is chosen by validation NDCG@10."""
    rate_epochs: int | None = Field(None, ge=1)
    """Epochs by which it is chosen; null for whole trainings."""
    seeds: list[int] = Field([1], min_length=1)
    """The first of them of all cells; the others of the ``headline`` alone."""
    headline: list[str] = Field(default_factory=list)
    """Variants that are trained with every seed."""
    std: float | None = Field(0.02, gt=0)
    """Deviation that item vectors are scaled to as a whole; null leaves them as they are."""
    protocols: list[str] = Field(["elephant-100", "elephant-full"], min_length=1)
    cutoffs: list[int] = Field([5, 10, 50], min_length=1)
    cold_targets: Literal["drop", "rank", "miss"] = "drop"
    """Held-out items that never occur in training; the paper leaves these instances out."""

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        for variant in [*self.variants, *self.headline]:
            how, _, what = variant.replace("id+", "id+ ").partition(" ")
            if variant not in (RANDOM, *FURTHER) and (
                how not in ("frozen", "trainable", "id+") or what not in (*OWN, *self.more)
            ):
                raise ValueError(f"unknown variant {variant!r}")
        for name in self.protocols:
            if name not in PRESETS:
                raise ValueError(f"unknown protocol {name!r}; there are: {', '.join(PRESETS)}")
        for name in (*self.recformers, *self.models, *self.more):
            if not name or "/" in name:
                raise ValueError(f"{name!r} names a folder: no '/'")
        return self


class ElephantRun:
    """One study in its run folder.

    Args:
        path: its recipe.
        overrides: ``key=value`` of the study.

    Raises:
        UserError: if any of its recipes is impossible; before any of them runs.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.study = study = build(ElephantStudy, apply_overrides(read_recipe(path), overrides))
        self.data = study.targets.get(study.target, study.target)
        self.out = study.run / Path(study.target).name
        self.settings = {name: self._settings(changes) for name, changes in study.recformers.items()}
        self.protocols: dict[str, Protocol] = {
            name: preset(name).model_copy(update={"cutoffs": tuple(study.cutoffs), "cold_targets": study.cold_targets})
            for name in study.protocols
        }
        self.first = next(iter(study.recformers))

    def execute(self, command: str) -> dict[str, Any]:
        """Run what is not done yet; the content of ``result.json``."""
        begin, folder = time.monotonic(), RunFolder(self.out)
        RunFolder(self.study.run)
        with folder.lock("launcher"):
            folder.claim(self.study)
            rows = [row for name in self.settings for row in self._recformer_rows(name)]
            ranks: dict[tuple[str, str, str, int], dict[str, Metrics]] = {}
            begin = _count(folder, begin)
            for model, variant, name in self._cells():
                for seed in self.study.seeds if variant in self.study.headline else self.study.seeds[:1]:
                    run = self._train(model, variant, name, seed)
                    ranks[model, variant, name, seed] = self._ranks(run)
                    told = {"model": model, "variant": variant, "recformer": name, "seed": seed}
                    told |= {"parameters": self._parameters(run)}
                    begin = _count(folder, begin)
                    rows += [
                        told
                        | {"protocol": protocol, "protocol_hash": self.protocols[protocol].hash}
                        | metrics.summary()
                        for protocol, metrics in ranks[model, variant, name, seed].items()
                    ]
            serving = elephant_claims.serving(
                {key: self._folder(*key) for key in ranks if key[3] == self.study.seeds[0]}
            )
            attention = self._attention()
            described = {name: protocol.described() for name, protocol in self.protocols.items()}
            elephant_sizes.draw(self.out, elephant_claims.means(rows), self._shares())
            _count(folder, begin)
            return folder.write_result(
                command,
                hash_of(self.study),
                {"hash": hash_of([protocol.hash for protocol in self.protocols.values()]), **described},
                rows,
                sum(row["seconds"] for row in folder.events("studied")),
                elephant_claims.claims(rows, ranks, serving, self.first),
                means=elephant_claims.means(rows),
                serving=serving,
                attention=attention,
                speed={name: self._speed(name) for name in self.settings},
            )

    def _settings(self, changes: Sequence[str]) -> RecformerSettings:
        content = self.study.recformer.model_dump(mode="json")
        if (own := content["finetune"]) is not None:  # judged as the recommenders are
            own |= {"protocols": self.study.protocols, "cold_targets": self.study.cold_targets}
            own["evaluate"] |= {"cutoffs": self.study.cutoffs, "cold_targets": self.study.cold_targets}
        return build(RecformerSettings, apply_overrides(content, changes))

    def _cells(self) -> list[tuple[str, str, str]]:
        """(model, variant, RECFORMER) of every recommender."""
        needs = {*(f"{how}{what}" for how in ("frozen ", "trainable ", "id+") for what in ("PT", "FT")), *FURTHER}
        return [
            (model, variant, name)
            for name in self.settings
            for model in self.study.models
            for variant in self.study.variants
            if name == self.first or variant in needs
        ]

    # stage-PT, FT1, FT2

    def _pretraining(self, name: str) -> RecformerJob | None:
        settings = self.settings[name]
        if settings.pretrain is None:
            return None
        own = settings.model_copy(update={"finetune": None})
        content = {"data": (own.pretrain.sources or [self.data])[0], "run": "-", "llm": {"recformer": own.model_dump()}}
        job = build(RecformerJob, content)
        mark = hash_of([job.identity("pretrain"), own.pretrain.sources or [self.data]])
        return job.model_copy(update={"run": self.study.run / f"pretrained-{mark[:8]}"})

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
            if before is None or other == name or _first_stage(before) != _first_stage(job):
                continue
            source = before.finetune_folder / "FT1"
            if (source / recformer.FINISHED).exists():
                temporary = own.with_name(f"{files.TEMPORARY_PREFIX}FT1")
                shutil.rmtree(temporary, ignore_errors=True)
                shutil.copytree(source, temporary)
                temporary.rename(own)
                return

    def _speed(self, name: str) -> dict[str, Any]:
        jobs = [job for job in (self._pretraining(name), self._finetuning(name)) if job is not None]
        return {key: value for job in jobs for key, value in recformer.speed_of(RunFolder(job.run)).items()}

    def _vectors(self, what: str, name: str) -> Path:
        """The file of item vectors called ``what``, made when it is first asked for."""
        of_own = what in ("PT", "FT") and name != self.first
        path = self.out / "vectors" / f"{what}{f' {name}' if of_own else ''}.safetensors"
        if path.exists():
            return path
        if what in self.study.more:
            vectors.write(self.study.more[what], Path(self.data), path, item_text=self.study.item_text)
            return path
        # An untuned one is any job's: the backbone as RECFORMER reads it.
        job = self._finetuning(name) if what == "FT" else self._pretraining(name) or self._finetuning(name)
        if job is None or (what == "PT" and job.settings.pretrain is None):
            raise UserError(f"variants with {what} vectors need recformer.{'finetune' if what == 'FT' else 'pretrain'}")
        vectors.write(str(job.run), Path(self.data), path, what)
        return path

    def _attention(self) -> dict[str, Any] | None:
        """Fig. 1: the first RECFORMER's maps beside its backbone's."""
        job, before = self._finetuning(self.first), self._pretraining(self.first)
        if job is None or before is None:
            return None
        tuned = job.finetune_folder / "FT1" / "model"
        return elephant_attention.analyse(before.settings, tuned, job.open(self.data), job.tokens, self.out)

    def _shares(self) -> dict[str, float]:
        return {name: own.pretrain.share for name, own in self.settings.items() if own.pretrain is not None}

    # the recommenders

    def _folder(self, model: str, variant: str, name: str, seed: int) -> Path:
        own = variant if name == self.first else f"{variant} {name}"
        return self.out / model / own.replace(" ", "-") / f"seed-{seed}"

    def _train(self, model: str, variant: str, name: str, seed: int) -> Path:
        """Train one cell unless it is trained; its run folder."""
        run = self._folder(model, variant, name, seed)
        rec = self._rec(model, variant, name, seed)
        rate = self._rate(rec, run.parent / "rate") if len(self.study.lrs) > 1 else self.study.lrs[0]
        log.info("%s, %s, seed %d, lr %g", model, variant, seed, rate)
        job = RecJob(data=self.data, run=run, rec=rec.model_copy(update={"train": _with(rec.train, lr=rate)}))
        train(job, f"recalign train {run}/config.yaml")
        return run

    def _rate(self, rec: RecConfig, run: Path) -> float:
        """The learning rate with the best validation NDCG@10, by the first seed."""
        epochs = min(self.study.rate_epochs or rec.train.epochs, rec.train.epochs)
        first = _with(rec.train, epochs=epochs, seed=self.study.seeds[0])
        own = rec.model_copy(update={"train": first, "grid": {"train.lr": self.study.lrs}})
        if not (run / recformer.FINISHED).exists():
            train(RecJob(data=self.data, run=run, rec=own), f"recalign train {run}/config.yaml")
        return float(files.read_json(run / recformer.FINISHED)["chosen"].removeprefix("lr="))

    def _rec(self, model: str, variant: str, name: str, seed: int) -> RecConfig:
        rec, tune = self.study.models[model], FURTHER.get(variant)
        how, _, what = variant.replace("id+", "id+ ").partition(" ")
        items: dict[str, Any] = {"kind": "id"}
        if tune is not None:
            how, what = "trainable", "FT"
        if variant != RANDOM:
            items = {"kind": "vectors", "file": str(self._vectors(what, name)), "std": self.study.std}
            items |= {"kind": "id+vectors"} if how == "id+" else {"trainable": how == "trainable"}
        start = {"start": str(self._train(model, START, name, seed)), "tune": tune} if tune is not None else {}
        content = rec.model_dump(mode="json") | {"items": items}
        content["train"] |= {"seed": seed, **start}
        content["evaluate"] |= {"cutoffs": self.study.cutoffs, "cold_targets": self.study.cold_targets}
        return build(RecConfig, content)

    def _ranks(self, run: Path) -> dict[str, Metrics]:
        """The ranks of all test instances under every protocol, kept beside the model."""
        return elephant_claims.ranks_of(run, self.protocols)

    def _parameters(self, run: Path) -> int:
        return files.read_json(run / "result.json")["rows"][0]["parameters"]


def _count(folder: RunFolder, begin: float) -> float:
    """Log the seconds since ``begin``, so that a study that is killed keeps what it had spent; now."""
    now = time.monotonic()
    folder.log("studied", seconds=round(now - begin, 1))
    return now


def _first_stage(job: RecformerJob) -> str:
    """A hash of what decides stage-FT1 alone."""
    content = json.loads(job.settings.model_dump_json(exclude={"processes", "zero_stage"}))
    for key in ("fixed_epochs", "train_table"):
        (content["finetune"] or {}).pop(key, None)
    return hash_of([content, job.data])


def _with(section: Section, **changes: Any) -> Any:
    return build(type(section), section.model_dump(mode="json") | changes)
