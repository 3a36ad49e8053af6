"""A study: one main job in several variants, each with several seeds; what comes before alignment is done once.

``recalign reproduce NAME``: each variant is a run folder of its own, ``OUT/seed-S/VARIANT``, made by the very code that
``recalign align`` runs, so any of them can be looked into, resumed or replayed alone.
"""

import itertools
import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from align.config import AlignConfig, MainJob, TrainerConfig, load_job
from launch.alignment import closed_world, study_plot
from launch.alignment.main_job import BEGINS, MainJobRun, require_the_same_data
from launch.seeds import means
from rec.data.builtin import BUILTIN
from rec.data.prepare import Filters, prepare
from rec.data.readers import closed_world as world
from rec.runtime import files
from rec.runtime.config import Section, apply_overrides, build, hash_of, leave_out_nulls, read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

log = logging.getLogger(__name__)

WORLD, WORLD_FOLDER = "closed-world", "world"
SEEDS = ("rec.train.seed", "llm.train.seed", "llm.knowledge.seed", "align.trainer.seed", "align.finish.seed")
BY = ("variant", "model", "method")
COMPLETE, STUDIED = "complete", "studied.json"


class Study(Section):
    """The recipe of a study."""

    selection: ClassVar[tuple[str, ...]] = ("seeds", "variants")

    job: str
    """The recipe of the main job, relative to this one."""
    run: Path
    """The run folder."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    """Of everything; of a closed world, of the world too."""
    variants: dict[str, list[str]] = Field({"SeRALM": []}, min_length=1)
    """Overrides of the job's keys, by a name; null leaves out one of the recipe's: ``variants.LightSANs=null``."""


class StudyRun:
    """One study in its run folder.

    Args:
        path: its recipe.
        overrides: ``key=value`` of the study, and of the job behind ``job.``: ``job.rec.train.epochs=5``.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        of_job = [override.removeprefix("job.") for override in overrides if override.startswith("job.")]
        of_study = [override for override in overrides if not override.startswith("job.")]
        given = read_recipe(path)
        self.study = build(Study, leave_out_nulls(apply_overrides(given, of_study), given, "variants"))
        self.out = self.study.run
        recipe = path.parent / self.study.job
        # Every recipe is checked before the first one runs.
        self.jobs: dict[tuple[int, str], MainJob] = {}
        self.worlds: set[tuple[int, str]] = set()
        for seed, (name, changes) in itertools.product(self.study.seeds, self.study.variants.items()):
            self._add_job(recipe, seed, name, [*changes, *of_job])

    def execute(self, command: str) -> dict[str, Any]:
        """Run what is not done yet; the content of ``result.json``."""
        folder = RunFolder(self.study.run)
        with folder.lock("launcher"):
            folder.claim(self.study)
            for job in self.jobs.values():
                RunFolder(job.run).claim(job)
            found = {key: self._run(*key) for key in self.jobs}
            rows = [row for own in found.values() for row in own["rows"]]
            summed = means(rows, BY)
            if len(self.study.variants) > 1:
                study_plot.draw(folder.path, summed)
            world_rows = [own["world"] for own in found.values() if own["world"]]
            if world_rows:
                closed_world.draw(folder.path, {key: self.jobs[key] for key in self.jobs if key in self.worlds})
            return folder.write_result(
                command,
                hash_of([job.identity for job in self.jobs.values()]),
                next(iter(found.values()))["protocol"],
                rows,
                sum(own["wall_s"] for own in found.values()),
                # Several variants are there to differ: some are bad on purpose.
                closed_world.claims(world_rows) if world_rows and len(self.study.variants) == 1 else [],
                means=summed,
                **({"world": world_rows} if world_rows else {}),
                **self._data(),
            )

    def _data(self) -> dict[str, Any]:
        """What the results say of their data, where that is the same for all."""
        told = [RunFolder(job.run).result().get("data") for job in self.jobs.values()]
        return {"data": told[0]} if told[0] and all(own == told[0] for own in told) else {}

    def _add_job(self, recipe: Path, seed: int, name: str, overrides: list[str]) -> None:
        if not name or "/" in name or name == WORLD_FOLDER:
            raise UserError(f"variant {name!r}: it names a folder, so no '/' and not {WORLD_FOLDER!r}")
        here = self.study.run / f"seed-{seed}"
        content = [*(f"{key}={seed}" for key in SEEDS), *overrides, f"run={json.dumps(str(here / name))}"]
        self.jobs[seed, name] = load_job(recipe, content)
        if self.jobs[seed, name].data == WORLD:
            # The built-in one has one seed.
            self.worlds.add((seed, name))
            job = load_job(recipe, [*content, f"data={json.dumps(str(here / WORLD_FOLDER))}"])
            if missing := [fact for fact in world.ATTRIBUTES if fact not in job.align.watch]:
                raise UserError(f"a closed world's align.watch needs all of its facts, {missing[0]!r} is missing")
            self.jobs[seed, name] = job

    def _run(self, seed: int, name: str) -> dict[str, Any]:
        job = self.jobs[seed, name]
        done = job.run / STUDIED
        require_the_same_data(job, RunFolder(job.run))
        if done.exists() and RunFolder(job.run).result() is not None:
            return files.read_json(done)
        log.info("%s, seed %d", name, seed)
        is_world = (seed, name) in self.worlds
        if is_world:
            prepare(WORLD, world.read(world_seed=seed), Path(job.data), Filters(**world.FILTERS))
        before, folder = share_what_comes_before(job), RunFolder(job.run)
        begin = time.monotonic()
        try:
            result = MainJobRun(job).execute(f"recalign align {job.run}/config.yaml")
            figures = closed_world.figures(job) if is_world else {}
        finally:
            folder.log("studied", seconds=round(time.monotonic() - begin, 1))
        told = {"seed": seed, "variant": name}
        # Every attempt, and what was done before for all variants, whoever did it.
        wall_s = sum(row["seconds"] for row in folder.events("studied"))
        shared_s = before.worked_s(*BEGINS)
        content = {
            "rows": [{**told, **row} for row in (*result["rows"], *result.get("ablations", ()))],
            "world": {**told, **figures, "shared_s": shared_s, "wall_s": wall_s} if is_world else None,
            "protocol": result["protocol"],
            "wall_s": wall_s,
        }
        files.write_json(done, content)
        return content


def share_what_comes_before(job: MainJob) -> RunFolder:
    """Put into the job's run folder what comes before alignment, made once for all jobs that have it in common.

    Returns:
        The run folder that it was made in.
    """
    RunFolder(job.run).claim(job)  # which refuses another job's folder before anything is made
    before = _before_alignment(job)
    common = job.run.parent / f"before-alignment-{_name(before)}"
    done = common / COMPLETE
    require_the_same_data(job, RunFolder(common))
    if not done.exists():
        own = before.model_copy(update={"run": common})
        RunFolder(common).claim(own)
        parts = _parts(before)
        _take_what_others_made(common, parts)
        MainJobRun(own).execute("", stop_before_alignment=True)
        files.write_json(done, parts)
    for source in sorted(common.iterdir()):
        if source.is_dir():
            _copy_whole(source, job.run / source.name)
    return RunFolder(common)


def _take_what_others_made(common: Path, parts: dict[str, str]) -> None:
    """Stages that another job's folder beside this one has, and that are the same for both."""
    own = RunFolder(common).inputs()
    for other in sorted(common.parent.glob(f"before-alignment-*/{COMPLETE}")):
        theirs = RunFolder(other.parent).inputs()
        if any(own.get(name, value) != value for name, value in theirs.items()):
            continue  # of other data, or another model, than there is now
        made = files.read_json(other)
        for name, decided_by in parts.items():
            source = other.parent / name
            if made.get(name) == decided_by and source.is_dir():
                _copy_whole(source, common / name)


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a folder, whole or not at all, unless it is there."""
    if target.exists():
        return
    temporary = target.with_name(f"{files.TEMPORARY_PREFIX}{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(source, temporary)
    temporary.rename(target)


def _parts(before: MainJob) -> dict[str, str]:
    """By the name of a stage's folder, a hash of all that decides it, where that is less than the whole job."""
    content = _content(before)
    # The recommender's seed draws the users of train_users.
    common = [content["data"], content["train_users"], before.rec.train.seed]
    llm = hash_of([*common, content["llm"]])
    return {"llm": llm, "knowledge": llm, "base": hash_of([*common, content["rec"]])}


def _before_alignment(job: MainJob) -> MainJob:
    """The job with the defaults for everything that only matters from alignment on."""
    align = job.align
    decides = {
        name: getattr(align, name)
        for name in ("reward_users", "knowledge_on_target", "knowledge_dropout", "standardise_knowledge", "id_dropout")
    }
    # The seed chooses the users that are set aside; adapters decide which models are refused.
    trainer = TrainerConfig(seed=align.trainer.seed if align.reward_users else 0, lora=align.trainer.lora)
    return job.model_copy(update={"align": AlignConfig(**decides, trainer=trainer)})


def _name(before: MainJob) -> str:
    """A hash of everything that decides the stages before alignment."""
    return hash_of(_content(before))[:8]


def _content(before: MainJob) -> dict[str, Any]:
    content = before.model_dump(mode="json", exclude={"run"})
    if before.data not in BUILTIN:
        # Where it lies as seen from here: the whole study may move.
        content["data"] = os.path.relpath(before.data, before.run.parent)
    return content
