"""What only a closed world can tell: do the texts say what matters, and how much of what could be won was won?"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from align.config import MainJob, Stages
from align.order import training_data
from launch.alignment.main_job import catalog_texts, train_reading
from launch.alignment.precondition import PRECONDITION, precondition
from launch.alignment.summary import moving_mean
from llm.knowledge import first_texts
from rec.build import MODEL
from rec.data.prepared import Prepared
from rec.data.readers.closed_world import ATTRIBUTES
from rec.evaluation import evaluate
from rec.models.base import SequenceRecommender
from rec.runtime.runfolder import RunFolder

matplotlib.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt

RELEVANT, GAP_CLOSED, ORACLE_RATIO = 0.9, 0.8, 2.0
QUARTER, QUARTER_MARGIN, MOST_MINUTES = 0.25, 0.05, 20
METRIC = "HR@10"
WINDOW = 20


def figures(job: MainJob) -> dict[str, Any]:
    """Of a finished main job: which facts its texts state, the oracle's metrics, and the share of the gap closed.

    The oracle is the recommender that reads knowledge, trained as Base+NA_LLM was, but on texts that state the driving
    attribute of every item.
    """
    stages, run = Stages(job.run), RunFolder(job.run)
    steps = run.steps("train")
    data = training_data(job, Prepared.load(stages.data_folder(job.data)))
    driving = data.meta["options"]["driving"]
    result = run.result()
    found = {row["method"]: row[METRIC] for row in result["rows"]}
    oracle = _oracle(job, data, data.items[driving].to_pylist())
    na, aligned = found["Base+NA_LLM"], found["Base+SeRALM"]
    before, after = (shares(data, path) for path in (stages.na_knowledge, stages.final_knowledge))
    return {
        "driving": driving,
        "relevant_before": before[driving],
        "relevant_after": after[driving],
        "true_before": sum(before.values()),
        "true_after": sum(after.values()),
        "base": found["Base"],
        "na": na,
        "aligned": aligned,
        "oracle": oracle[METRIC],
        "oracle_se": oracle[f"{METRIC}_se"],
        "gap_closed": gap_closed(na, aligned, oracle[METRIC]),
        "steps_to_relevant": steps_to(steps, f"said_{driving}", RELEVANT),
        "lag_steps_mean": result["asynchronous"]["lag_steps_mean"],
        "draw_effective_fraction_least": min(row["draw_effective_fraction"] for row in steps),
        # As it was measured before the first step.
        "precondition": next(iter(run.events(PRECONDITION)), None) or precondition(job, data),
    }


def shares(data: Prepared, texts: Path) -> dict[str, float]:
    """Of each attribute, the share of items whose first text states it truly."""
    said = first_texts(texts)
    return {
        attribute: sum(text == fact for text, fact in zip(said, data.items[attribute].to_pylist(), strict=True))
        / data.n_items
        for attribute in ATTRIBUTES
    }


def gap_closed(na: float, aligned: float, oracle: float) -> float:
    """Share of the way from the not-aligned system to the oracle; no number where there is no way to go."""
    return (aligned - na) / (oracle - na) if oracle > na else math.nan


def steps_to(rows: Sequence[dict[str, Any]], name: str, level: float) -> int | None:
    """The first step up to which the mean of ``WINDOW`` steps is at least ``level``; None if it never is."""
    values = [row[name] for row in rows]
    for end in range(WINDOW, len(values) + 1):
        if sum(values[end - WINDOW : end]) / WINDOW >= level:
            return end
    return None


def claims(worlds: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is required of every seed, with the figure of the worst."""
    required = [
        ("before alignment the oracle's HR@10 is at least twice Base+NA_LLM's", ORACLE_RATIO,
         [row["oracle"] / row["na"] if row["na"] else math.inf for row in worlds]),
        ("the aligned LLM states the relevant fact for at least 90 % of items", RELEVANT,
         [row["relevant_after"] for row in worlds]),
        ("alignment closes at least 80 % of the gap to the oracle in HR@10", GAP_CLOSED,
         [row["gap_closed"] for row in worlds]),
    ]  # fmt: skip
    before = [row["relevant_before"] for row in worlds]
    furthest = max(before, key=lambda share: abs(share - QUARTER))
    minutes = max((row["shared_s"] + row["wall_s"]) / 60 for row in worlds)
    found = [(name, _worst(values), level) for name, level, values in required]
    return [
        *({"id": name, "holds": worst >= level, "figure": _figure(worst)} for name, worst, level in found),
        {
            "id": "before alignment it states the relevant fact for a quarter of the items (20 to 30 %)",
            "holds": abs(furthest - QUARTER) <= QUARTER_MARGIN,
            "figure": _figure(furthest),
        },
        {
            "id": f"a seed takes less than {MOST_MINUTES} minutes",
            "holds": minutes < MOST_MINUTES,
            "figure": _figure(minutes),
        },
    ]


def _worst(values: Sequence[float]) -> float:
    """The least; no number if one is none, wherever it stands."""
    return math.nan if any(map(math.isnan, values)) else min(values)


def _figure(value: float) -> float | str:
    """JSON has no number for what is none."""
    return round(value, 4) if math.isfinite(value) else "no number"


def draw(folder: Path, jobs: dict[tuple[int, str], MainJob]) -> Path:
    """Write ``closed-world.png``: what the sampled texts state and what that is worth, step by step."""
    figure, axes = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    colours = itertools.cycle(plt.rcParams["axes.prop_cycle"].by_key()["color"])
    seeds = {seed for seed, _ in jobs}
    for (seed, variant), job in jobs.items():
        driving = Prepared.load(Path(job.data)).meta["options"]["driving"]
        rows, colour = RunFolder(job.run).steps("train"), next(colours)
        label = f"{variant}, seed {seed}" if len(seeds) > 1 else variant
        for axis, name in zip(axes, (f"said_{driving}", f"gap_{driving}", "kl"), strict=True):
            steps, values = _smooth(rows, name)
            axis.plot(steps, values, color=colour, label=label, linewidth=1.4)
    axes[0].axhline(RELEVANT, color="grey", linestyle="--", linewidth=1)
    titles = ("texts that state the relevant fact", "reward of these minus that of the others", "KL to the original")
    for axis, title, unit in zip(axes, titles, ("share", "p(y|x,s) / group mean", "nats a text"), strict=True):
        axis.set(title=title, xlabel="trainer step", ylabel=unit)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(0, 1.02)
    axes[0].legend(fontsize=8)
    path = folder / "closed-world.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _oracle(job: MainJob, data: Prepared, facts: list[str]) -> dict[str, float]:
    folder = job.run / "oracle"
    train_reading(job, data, catalog_texts(job, facts), folder, "Oracle")
    model, on = SequenceRecommender.from_pretrained(folder / MODEL), job.rec.train.on
    return evaluate(model, data, "test", job.rec.evaluate, trained_on=on).summary()


def _smooth(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Means of up to ``WINDOW`` steps that have the figure."""
    known = [(row["step"], row[name]) for row in rows if row[name] is not None]
    return [step for step, _ in known], moving_mean([value for _, value in known], WINDOW)
