"""What a finished main job looks like: one table, the asynchronous figures, a few plots."""

from typing import Any

import matplotlib
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from align.config import Stages
from align.figures import saving_seconds
from launch.alignment.case_study import print_case
from launch.tables import describe, with_error
from rec.runtime.runfolder import RunFolder

matplotlib.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt

WAITS_LITTLE = 0.1


def asynchronous(run: RunFolder) -> dict[str, Any]:
    """Figures of the asynchronous training, from the metrics file alone.

    Waiting shares leave out the first step of every process: there the jobs wait for each other to start.
    """
    train, generated = run.steps("train"), run.steps("generated")
    published, refreshed = run.steps("published"), run.events("refresh")  # of every generator, and every start
    started = run.events("trainer_started")
    later_train, later_generated = train[1:] or train, _after_starting(generated)
    saving = saving_seconds(run)
    trainer_waits = _waiting_share(later_train, sum(saving.get(row["step"], 0.0) for row in later_train))
    generator_waits = _waiting_share(later_generated)
    # The one before the first step is not made while anybody waits.
    later_published = [row for row in published if row["version_step"]] or published
    return {
        "steps": len(train),
        "snapshots_published": len(published),
        "snapshots_loaded": len({row["version"] for row in refreshed}),
        "versions_consumed": len({version for row in train for version in row["versions"]}),
        "lag_steps_mean": _round(sum(row["lag_steps_mean"] for row in train) / len(train)),
        "lag_steps_max": max(row["lag_steps"] for row in train),
        "tokens_per_s": _tokens_per_s(later_generated),
        "texts_generated": sum(row["texts"] for row in generated),
        "empty_texts": sum(row["empty_texts"] for row in generated),
        "trainer_waiting_share": trainer_waits,
        "generator_waiting_share": generator_waits,
        "verdict": verdict(trainer_waits, generator_waits),
        "canary_max_difference": max(row["canary_max_difference"] for row in refreshed),
        **{f"{part}_s_mean": _mean(later_published, f"{part}_s") for part in ("publish", "gather", "write", "hash")},
        "refresh_s_mean": _round(sum(row["load_s"] for row in refreshed) / len(refreshed)),
        "canary_s_mean": _round(sum(row["canary_s"] for row in refreshed) / len(refreshed)),
        "lag_versions_max": max(row["lag_versions"] for row in train),
        "queued_mean": _mean(train, "queued"),
        # Of the lag, so many steps the batch lay ready; the others passed before it was written.
        **_lags(train),
        "engine": started[-1]["engine"],
        "zero_stage": started[-1]["zero_stage"],
        "trainer_ranks": started[-1]["world_size"],
        "restarts": len(run.events("restarted")),
        "reward_first_last": [_mean(train[:20], "reward"), _mean(train[-20:], "reward")],
        "reward_drift_last": _mean(train[-20:], "reward_drift"),
        "effective_sample_fraction_last": _mean(train[-20:], "effective_sample_fraction"),
        "effective_sample_fraction_min": min(row["effective_sample_fraction"] for row in train),
        "importance_ratio_max": max(row["importance_ratio_max"] for row in train),
        "kl_last": _mean(train[-20:], "kl"),
    }


def verdict(trainer_waits: float, generator_waits: float) -> str:
    """Which job holds the other up, by the shares of their time that they wait, and what to do about it."""
    if max(trainer_waits, generator_waits) < WAITS_LITTLE:
        return "balanced: neither job waits for the other"
    if trainer_waits > generator_waits:
        return "generator-bound: give it more of the devices, or draw fewer texts"
    return "trainer-bound: give it more of the devices, or draw more texts a step"


def print_result(result: dict[str, Any], console: Console | None = None) -> None:
    """The table and the asynchronous figures, for people."""
    console = console or Console(width=110, highlight=False)
    data = result["data"]
    table = Table(
        title=f"{data['name']}: " + ", ".join(f"{data[what]:,} {what}" for what in ("users", "items", "interactions")),
        caption=f"test items; {describe(result['protocol'])}; ± is the standard error over users",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("method", "HR@10", "NDCG@10"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for rows in (result["rows"], result["ablations"]):
        for row in rows:
            table.add_row(f"{row['model']} {row['method']}", *(with_error(row, name) for name in ("HR@10", "NDCG@10")))
        table.add_section()
    console.print(table)
    print_case(result["case_study"], console)
    a = result["asynchronous"]
    told = result["texts"]
    console.print(
        f"Texts: {told['items_without_text']} of {data['items']:,} items have no text; of the catalog's"
        f" {told['aligned']['rows']:,} texts {told['not_aligned']['empty']} were empty before and"
        f" {told['aligned']['empty']} are after, {told['not_aligned']['cut']} and {told['aligned']['cut']} cut"
    )
    console.print(
        f"Alignment: {a['steps']} steps of {a['engine']} (ZeRO-{a['zero_stage']}) on {a['trainer_ranks']} ranks;"
        f" {a['snapshots_published']} snapshots published, {a['snapshots_loaded']} loaded by vLLM,"
        f" samples of {a['versions_consumed']} versions trained on"
    )
    console.print(
        f"Staleness: mean {a['lag_steps_mean']} steps ({a['lag_in_flight_mean']} in flight,"
        f" {a['lag_in_queue_mean']} in the queue),"
        f" max {a['lag_steps_max']};"
        f" generated {a['tokens_per_s']:,.0f} tokens/s, {a['empty_texts']} of {a['texts_generated']} texts empty;"
        f" waiting: trainer {a['trainer_waiting_share']:.0%}, generator {a['generator_waiting_share']:.0%} of its time"
    )
    console.print(
        f"A refresh: {a['publish_s_mean']:.2f} s to publish (gather {a['gather_s_mean']:.2f}, write"
        f" {a['write_s_mean']:.2f}, hash {a['hash_s_mean']:.2f}), {a['refresh_s_mean']:.2f} s to load,"
        f" {a['canary_s_mean']:.2f} s to prove; {a['verdict']}"
    )
    console.print(
        f"Canary: vLLM and trainer differ by at most {a['canary_max_difference']:.1e} nats after every swap;"
        f" reward p(y|x,s)/p(y|x) {a['reward_first_last'][0]:.3f} → {a['reward_first_last'][1]:.3f},"
        f" KL to the original {a['kl_last']:.3f} nats a text; restarts: {a['restarts']}"
    )


def draw(run: RunFolder, stages: Stages) -> None:
    """Write ``plots/alignment.png`` and ``plots/training.png``."""
    folder = run.path / "plots"
    folder.mkdir(exist_ok=True)
    train = run.steps("train")
    steps = [row["step"] for row in train]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    panels = [
        ("losses", ["rec_loss"], "-log p(y|x,s), nats"),
        ("KL to the original LLM", ["kl"], "nats a text"),
        ("reward", ["reward"], "mean p(y|x,s) / p(y|x)"),
        ("staleness of the samples trained on", ["lag_steps"], "trainer steps"),
    ]
    for axis, (title, names, unit) in zip(axes.flat, panels, strict=True):
        for name in names:
            values = [row[name] for row in train]
            smooth = len(train) >= 40 and not name.startswith("lag")
            axis.plot(steps, values, alpha=0.3 if smooth else 1, linewidth=1, label=name)
            if smooth:
                axis.plot(steps, moving_mean(values, 20), linewidth=1.6, label=f"{name}, mean of 20 steps")
        _dress(axis, title, "trainer step", unit)
    twin = axes[0, 0].twinx()
    twin.plot(steps, [row["policy_loss"] for row in train], color="tab:green", alpha=0.4, linewidth=1)
    twin.set_ylabel("policy loss (green)")
    figure.savefig(folder / "alignment.png", dpi=120)
    plt.close(figure)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for name, where in (("Base", stages.base), ("Base+NA_LLM", stages.na), ("Base+SeRALM", stages.final)):
        rows = [row for row in RunFolder(where).steps("epoch") if "NDCG@10" in row]
        left.plot([row["step"] for row in rows], [row["NDCG@10"] for row in rows], marker=".", label=name)
    _dress(left, "recommenders", "epoch", "validation NDCG@10")
    rows = RunFolder(stages.llm).steps("lm_step") if stages.llm.exists() else []
    right.plot([row["step"] for row in rows], [row["loss"] for row in rows], label="LM loss")
    _dress(right, "LLM from scratch", "step", "nats a token")
    figure.savefig(folder / "training.png", dpi=120)
    plt.close(figure)


def _dress(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def moving_mean(values: list[float], width: int) -> list[float]:
    """The mean of up to ``width`` values that end at each place."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]


def _after_starting(generated: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the first row of every generator's process."""
    firsts: dict[int, int] = {}
    later = [row for place, row in enumerate(generated) if firsts.setdefault(row["pid"], place) != place]
    return later or generated


def _tokens_per_s(generated: list[dict[str, Any]]) -> float:
    """Of all generators, which are at work beside each other."""
    rates = []
    for number in {row.get("generator", 0) for row in generated}:
        own = [row for row in generated if row.get("generator", 0) == number]
        rates.append(sum(row["tokens"] for row in own) / max(sum(row["generate_s"] for row in own), 1e-9))
    return _round(sum(rates))


def _waiting_share(rows: list[dict[str, Any]], besides_s: float = 0.0) -> float:
    waited, busy = (sum(row[name] for row in rows) for name in ("waited_s", "busy_s"))
    return _round(waited / max(waited + busy + besides_s, 1e-9))


def _lags(train: list[dict[str, Any]]) -> dict[str, float | None]:
    """Of the batches whose time in the queue is known: of none after a resume until what lay there is used up."""
    known = [row for row in train if row["lag_in_queue"] is not None]
    if not known:
        return {"lag_in_queue_mean": None, "lag_in_flight_mean": None}
    in_flight = sum(row["lag_steps_mean"] - row["lag_in_queue"] for row in known) / len(known)
    return {"lag_in_queue_mean": _mean(known, "lag_in_queue"), "lag_in_flight_mean": _round(in_flight)}


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return _round(sum(row[name] for row in rows) / len(rows))


def _round(value: float) -> float:
    return round(value, 4)
