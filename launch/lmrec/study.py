"""``recalign reproduce lmrec-…``: variants of LMRec with several seeds, beside controls and the paper's figures.

Every pretraining and probe is a run folder of its own, ``OUT/seed-S/VARIANT``, made by the very jobs that ``recalign
pretrain`` and ``recalign probe`` start; a study that was interrupted goes on where it was.
"""

import itertools
import json
import logging
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import matplotlib
from pydantic import Field, model_validator

from launch import pretraining
from launch.bench.lmrec import packed_and_padded
from launch.controls import Popularity, Transitions
from launch.lmrec import analysis
from launch.seeds import METRICS, means
from llm import probe
from llm.lmrec_job import LMRecJob, RecommendConfig, load_job
from llm.probe_job import ProbeJob
from llm.training import STEP
from rec.evaluation import evaluate
from rec.job import open_data
from rec.runtime.config import Section, apply_overrides, build, hash_of, leave_out_nulls, read_recipe
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

matplotlib.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt

log = logging.getLogger(__name__)

KEY = "pretrain"
JOINT, AGNOSTIC = "LMRec", "LMRec +agnostic"
# Student's t, 95 % two-sided, for 2 to 10 seeds; of more, that of 10, which is a little too wide.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
NEAR = 0.1
"""How far from the paper's figure still counts as near, as a share of it."""


class VariantConfig(Section):
    """One run, or two of which the second starts from what the first left."""

    first: list[str] | None = None
    """Overrides of a pretraining that comes first."""
    then: list[str] | None = None
    """Overrides of the pretraining that is the variant (after a first one: SelfPretrain)."""
    probe: list[str] | None = None
    """Overrides of a probe of the first run instead (Tables 1 and 7)."""

    @model_validator(mode="before")
    @classmethod
    def _one_run(cls, given: Any) -> Any:
        return {"then": given} if isinstance(given, list) else given

    @model_validator(mode="after")
    def _has_one_result(self) -> Self:
        if (self.then is None) == (self.probe is None):
            raise ValueError("a variant has exactly one of then and probe")
        if self.probe is not None and self.first is None:
            raise ValueError("a probe needs a first run")
        return self


class LMRecStudy(Section):
    """The recipe of such a study."""

    selection: ClassVar[tuple[str, ...]] = (
        "seeds",
        "variants",
        "controls",
        "sizes",
        "inference_users",
        "curvature_batches",
        "paper",
    )

    pretrain: str
    """The recipe of the pretraining, relative to this one."""
    run: Path
    """The run folder."""
    seeds: list[int] = Field([0, 1, 2], min_length=1)
    variants: dict[str, VariantConfig] = Field({JOINT: VariantConfig(then=[])}, min_length=1)
    """By a name: overrides of the recipe's keys, or two runs. One that is null is left out:
    ``"variants.LMRec -lm=null"``."""
    controls: bool = True
    """Popularity and last-item transitions too."""
    packing_steps: int = Field(10, ge=0)
    """Steps by which packed and padded rows are compared; 0 leaves it out."""
    sizes: bool = False
    """Draw HR@10 by parameters (Fig. 4)."""
    inference_users: int = Field(0, ge=0)
    """Compare inference times for one batch of so many users (Table 6), with the first variant that recommends."""
    curvature_batches: int = Field(0, ge=0)
    """Hessian eigenvalues of every variant over so many batches (Fig. 5), of the L2 of the first that recommends."""
    paper: dict[str, dict[str, float]] = Field(default_factory=dict)
    """The paper's HR@10 and NDCG@10 by variant, printed beside ours."""


class LMRecStudyRun:
    """One study in its run folder.

    Args:
        path: its recipe.
        overrides: ``key=value`` of the study, and of its pretrainings behind ``job.``.

    Raises:
        UserError: if any of its recipes is impossible; before any of them runs.
    """

    def __init__(self, path: Path, overrides: Sequence[str] = ()) -> None:
        self.of_job = [override.removeprefix("job.") for override in overrides if override.startswith("job.")]
        of_study = [override for override in overrides if not override.startswith("job.")]
        given = read_recipe(path)
        self.study = build(LMRecStudy, leave_out_nulls(apply_overrides(given, of_study), given, "variants"))
        self.out = self.study.run
        self.recipe = path.parent / self.study.pretrain
        for name in self.study.variants:
            if not name or "/" in name:
                raise UserError(f"variant {name!r}: it names a folder, so no '/'")
        self.jobs: dict[tuple[int, str], list[LMRecJob]] = {}
        self.probes: dict[tuple[int, str], ProbeJob] = {}
        for seed, (name, variant) in itertools.product(self.study.seeds, self.study.variants.items()):
            self._add(seed, name, variant)

    def execute(self, command: str) -> dict[str, Any]:
        """Run what is not done yet; the content of ``result.json``."""
        folder = RunFolder(self.study.run)
        with folder.lock("launcher"):
            folder.claim(self.study)
            rows = [row for key in self.jobs for row in self._run(*key)]
            job = next(iter(self.jobs.values()))[0]
            first = RunFolder(job.run).result()
            controls = self._controls(job) if self.study.controls else []
            summed = means(rows, ("variant",), users_se=True)
            summed = [self._beside_the_paper(row) for row in [*summed, *controls]]
            missing = [name for name in self.study.paper if name not in {row["variant"] for row in summed}]
            summed += [{"variant": name, "seeds": 0, "paper": self.study.paper[name]} for name in missing]
            packing = self._packing(job, folder)
            self._draw(folder)
            more = {"packing": packing} if packing else {}
            more |= self._analyse(folder, rows)
            return folder.write_result(
                command,
                hash_of(
                    [
                        [job.identity for own in self.jobs.values() for job in own],
                        [own.model_dump(mode="json", exclude={"run"}) for own in self.probes.values()],
                    ]
                ),
                first["protocol"],
                rows,
                sum(
                    RunFolder(own.run).result()["wall_s"]
                    for own in [*itertools.chain(*self.jobs.values()), *self.probes.values()]
                ),
                claims(rows, self.study.paper, packing, controls),
                means=summed,
                data=first["data"],
                **more,
            )

    def _add(self, seed: int, name: str, variant: VariantConfig) -> None:
        own = self.study.run / f"seed-{seed}" / name

        def job(run: Path, changes: Sequence[str]) -> LMRecJob:
            told = [f"llm.train.seed={seed}", *changes, *self.of_job, f"run={json.dumps(str(run))}"]
            return load_job(self.recipe, told)

        if variant.first is None:
            self.jobs[seed, name] = [job(own, variant.then)]
            return
        first = job(own / "first", variant.first)
        start = f"llm.model={json.dumps(str(first.run))}"
        if variant.then is not None:
            self.jobs[seed, name] = [first, job(own / "then", [*variant.then, start])]
            return
        self.jobs[seed, name] = [first]
        content = {
            "data": first.data,
            "run": str(own / "probe"),
            "rec": first.rec.model_dump(mode="json"),
            "llm": {"item_text": first.llm.item_text, "model": str(first.run), "probe": {"seed": seed}},
        }
        self.probes[seed, name] = build(ProbeJob, apply_overrides(content, variant.probe))

    def _run(self, seed: int, name: str) -> list[dict[str, Any]]:
        result: dict[str, Any] = {}
        for job in self.jobs[seed, name]:
            log.info("%s, seed %d: %s", name, seed, job.run)
            result = pretraining.pretrain(job)
        told, facts = {"seed": seed, "variant": name}, result["training"]
        if (seed, name) in self.probes:
            own = self.probes[seed, name]
            found = probe.run(own, f"recalign probe {own.run}/config.yaml")["rows"]
        else:
            found = result["rows"]
        if len(found) > 1:  # of several kinds of user feature
            found = [row | {"variant": f"{name}, {row['feature']}"} for row in found]
        rate = facts["tokens"] / max(1e-9, facts["seconds"])
        more = {"steps": facts["steps"], "parameters": facts["parameters"], "tokens_per_s": round(rate, 1)}
        return [{**told, **row, **more} for row in found]

    def _controls(self, job: LMRecJob) -> list[dict[str, Any]]:
        data, found = open_data(job.data, job.run / "data"), []
        for control in (Popularity(data), Transitions(data)):
            figures = evaluate(control, data, "test", job.rec.evaluate).summary()
            found.append({"variant": control.architecture, "seeds": 1, **figures})
        return found

    def _beside_the_paper(self, row: dict[str, Any]) -> dict[str, Any]:
        paper = self.study.paper.get(row["variant"])
        return row if paper is None else row | {"paper": paper}

    def _packing(self, job: LMRecJob, folder: RunFolder) -> dict[str, float]:
        if not self.study.packing_steps:
            return {}
        known = folder.events("packing")
        if not known:
            folder.log("packing", **packed_and_padded(job, self.study.packing_steps))
            known = folder.events("packing")
        return {name: known[-1][name] for name in ("packed", "padded")}

    def _analyse(self, folder: RunFolder, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Tables and plots of the analyses that the recipe asks for; what takes long is done once."""
        study, found = self.study, {}
        if study.sizes:
            analysis.draw_sizes(folder.path / "sizes.png", rows)
        # Of a language model alone there is no head to time, and no L2 to differentiate.
        joint = next((own[-1] for own in self.jobs.values() if own[-1].llm.recommend is not None), None)
        if study.inference_users and joint is not None:
            found["inference"] = analysis.inference(joint, study.inference_users)
            analysis.draw_inference(folder.path / "inference.png", found["inference"])
        if study.curvature_batches and joint is not None:
            known = self._eigenvalues(folder, joint.llm.recommend)
            found["eigenvalues"] = [analysis.summary(name, values) for name, values in known.items()]
            analysis.draw_eigenvalues(folder.path / "eigenvalues.png", known)
        return found

    def _eigenvalues(self, folder: RunFolder, settings: RecommendConfig) -> dict[str, list[float]]:
        """By variant, of the first seed's models."""
        wanted, found = self.study.curvature_batches, {}
        for name in self.study.variants:
            job = self.jobs[self.study.seeds[0], name][-1]
            of = {"run": job.identity, "loss": hash_of(settings)}
            known = [row["values"] for row in folder.events("eigenvalues") if of.items() <= row.items()][:wanted]
            for values in analysis.eigenvalues(job, range(len(known), wanted), settings):
                known.append(values)
                folder.log("eigenvalues", **of, values=values)
                log.info("Eigenvalues of %s: batch %d of %d", name, len(known), wanted)
            found[name] = [value for values in known for value in values]
        return found

    def _draw(self, folder: RunFolder) -> None:
        """Write ``lmrec.png``: losses of every run, step by step."""
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for (seed, name), own in self.jobs.items():
            rows = RunFolder(own[-1].run).steps(STEP)
            for axis, key in zip(axes, ("loss", "valid_target"), strict=True):
                known = [(row["step"], row[key]) for row in rows if key in row]
                if known:
                    axis.plot(*zip(*known, strict=True), label=f"{name}, seed {seed}", linewidth=1.2)
        for axis, title in zip(
            axes, ("language loss L1, nats a token", "recommendation loss L2, validation"), strict=True
        ):
            axis.set(title=title, xlabel="step")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
        figure.savefig(folder.path / "lmrec.png", dpi=120)
        plt.close(figure)


def claims(
    rows: Sequence[dict[str, Any]],
    paper: dict[str, dict[str, float]],
    packing: dict[str, float],
    controls: Sequence[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """What the runs are held to: joint training beats L2 alone and the controls, comes near the paper, packing pays.

    One beats another if 0 is outside of the 95 % interval around their mean difference, whose standard error is ``se``;
    where it is inside, ``undecided`` is true.
    """
    names = dict.fromkeys(row["variant"] for row in rows)
    found: list[dict[str, Any]] = []

    def add(name: str, holds: bool, figure: float, **more: Any) -> None:
        found.append({"id": name, "holds": bool(holds), "figure": round(figure, 4), **more})

    def add_better(one: str, other: str, metric: str) -> None:
        figure, se, times = _difference([*rows, *controls], one, other, metric)
        within = {"undecided": True} if abs(figure) <= times * se else {}
        add(f"{one} beats {other} in {metric}", figure > times * se, figure, se=round(se, 5), **within)

    for metric in METRICS:
        # "LMRec -lm, …" is what "LMRec, …" is without a language model, "LMRec^TL -lm, …" what "LMRec^TL, …" is.
        for joint in names:
            alone = re.sub(rf"^{JOINT}(\^TL)?", r"\g<0> -lm", joint)
            if joint != alone and alone in names:
                add_better(joint, alone, metric)
        if JOINT in names:
            for one, other in [(AGNOSTIC, JOINT), *((JOINT, control["variant"]) for control in controls)]:
                if one in names:
                    add_better(one, other, metric)
        for name, figures in paper.items():
            if name in names and metric in figures:
                ratio = _mean([row for row in rows if row["variant"] == name], metric) / figures[metric]
                near = abs(ratio - 1) <= NEAR
                add(f"{name} is within {NEAR:.0%} of the paper's {metric} (ratio)", near, ratio)
    if packing:
        ratio = packing["packed"] / packing["padded"]
        add("packed rows train more useful tokens a second than padded ones (ratio)", ratio > 1, ratio)
    return found


def _difference(rows: Sequence[dict[str, Any]], one: str, other: str, metric: str) -> tuple[float, float, float]:
    """Mean difference of two variants, its standard error, and how many of these 95 % are within: over seeds that both
    have, or with one seed over users, as if the two had not the same ones. Users are the same for all seeds: more seeds
    do not make that error any smaller."""
    ones, others = ([row for row in rows if row["variant"] == name] for name in (one, other))
    by_seed = {row.get("seed"): row for row in others}
    paired = [row[metric] - by_seed[row["seed"]][metric] for row in ones if row["seed"] in by_seed]
    if len(paired) > 1:
        times = STUDENT[min(len(paired), len(STUDENT) + 1) - 2]
        return statistics.mean(paired), statistics.stdev(paired) / math.sqrt(len(paired)), times
    errors = [statistics.mean(row[f"{metric}_se"] for row in own) for own in (ones, others)]
    return _mean(ones, metric) - _mean(others, metric), math.hypot(*errors), 1.96


def _mean(rows: Sequence[dict[str, Any]], metric: str) -> float:
    return statistics.mean(row[metric] for row in rows)
