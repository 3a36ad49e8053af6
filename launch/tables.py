"""Tables about recommenders for the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# Wide enough for a log file too: rich would wrap at 80 columns there.
LEAST_WIDTH = 110
GROUP_METRICS = ("HR@10", "NDCG@10", "MRR")


def console() -> Console:
    """Standard output, never narrower than a table needs."""
    plain = Console(highlight=False)
    return plain if plain.is_terminal else Console(highlight=False, width=max(LEAST_WIDTH, plain.width))


def print_training(result: dict[str, Any], run: Path) -> None:
    """The figures of a finished training."""
    training, protocol = result["training"], result["protocol"]
    rows = result["rows"]
    table = Table("metric", *(row["part"] for row in rows), title=f"{rows[0]['model']} on {result['data']['name']}")
    for name in _metric_names(rows[0]):
        table.add_row(name, *(_figure(row, name) for row in rows))
    out = console()
    out.print(table)
    out.print(f"Protocol {protocol['hash']}: {describe(protocol)}; trained on {training['trained_on']}")
    chosen = f"; best of the grid: {training['chosen']}" if "chosen" in training else ""
    out.print(
        f"{training['epochs']} epochs of {training['seconds_per_epoch']:.1f} s, best epoch"
        f" {_best_epoch(training)}{chosen}; {result['rows'][0]['parameters']:,} parameters"
    )
    out.print(f"Everything is in {run}: result.json, metrics.jsonl, model/", soft_wrap=True)


def print_evaluations(contents: list[dict[str, Any]], groups: bool) -> None:
    """One column a protocol; if wanted, for each of them a table of its groups."""
    out = console()
    title = f"{contents[0]['model']}, {contents[0]['part']} items"
    table = Table("metric", *(content["name"] for content in contents), title=title)
    table.add_row("instances", *(f"{content['instances']:,}" for content in contents))
    for name in sorted({name for content in contents for name in _metric_names(content["metrics"])}, key=_metric_order):
        table.add_row(name, *(_figure(content["metrics"], name) for content in contents))
    out.print(table)
    for content in contents if groups else ():
        names = [name for name in GROUP_METRICS if name in content["metrics"]]
        table = Table("group", "instances", *names, title=f"by kind of target and history: {content['name']}")
        for group, summary in content["groups"].items():
            table.add_row(group, f"{summary['instances']:,}", *(_figure(summary, name) for name in names))
        out.print(table)
    for content in contents:
        out.print(f"{content['name']} ({content['protocol']['hash']}): {describe(content['protocol'])}", soft_wrap=True)
        for remark in content["remarks"]:
            out.print(f"  note: {remark}", soft_wrap=True)


def print_comparison(found: dict[str, dict[str, Any]], one: Path, other: Path) -> None:
    """Differences with intervals and p-values."""
    table = Table("protocol", "metric", "difference", "95 % interval", "p", title=f"{one} minus {other}")
    for protocol, content in found.items():
        for name, row in content["metrics"].items():
            interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
            table.add_row(protocol, name, f"{row['difference']:+.4f}", interval, f"{row['p']:.4f}")
    out = console()
    out.print(table)
    for protocol, content in found.items():
        left = f"; {content['left_out']:,} that count for one run alone left out" if content["left_out"] else ""
        out.print(f"{protocol}: {content['instances']:,} instances of both{left}", soft_wrap=True)


def print_bench(result: dict[str, Any]) -> None:
    """One row a measurement, then the targets."""
    table = Table("stage", "data", "length", "system", "precision", "seconds", "times recalign's")
    for row in result["rows"]:
        if "failed" in row:
            table.add_row(row["stage"], row["data"], "", row["name"], "", "failed", "-")
            continue
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        reached = f" (to validation NDCG@10 {row['best']:.4f})" if "best" in row else ""
        if row["stage"] == "quality":
            reached = f" (test NDCG@10 {_figure(row, 'NDCG@10')})"
        figures = (row["precision"], f"{row['seconds']:.2f}", ratio)
        table.add_row(row["stage"], row["data"], str(row["max_length"]), row["name"] + reached, *figures)
    out = console()
    out.print(table)
    _print_claims(result["claims"], out)


def print_bench_align(result: dict[str, Any]) -> None:
    """Rates of the four measurements, the asynchronous figures, and whether the target is met."""
    out, figures = console(), result["asynchronous"]
    table = Table("mode", "samples/s")
    for row in result["rows"]:
        table.add_row(row["mode"], f"{row['samples_per_s']:.1f}")
    out.print(table)
    tokens = ", ".join(f"{name} {rate:,.0f}" for name, rate in result["tokens_per_s"].items())
    out.print(f"tokens a second: {tokens}")
    out.print(
        f"asynchronous is {result['speedup']:.2f} times synchronous; the trainer waits"
        f" {figures['trainer_waiting_share']:.0%}, the generator {figures['generator_waiting_share']:.0%} of its time;"
        f" a refresh: {figures['publish_s_mean']:.2f} s to publish, {figures['refresh_s_mean']:.2f} s to load,"
        f" {figures['canary_s_mean']:.2f} s to prove",
        soft_wrap=True,
    )
    _print_claims(result["claims"], out)


def _print_claims(claims: list[dict[str, Any]], out: Console) -> None:
    for claim in claims:
        figure = "-" if claim["figure"] is None else claim["figure"]
        figure = figure if isinstance(figure, str) else f"{figure:.3f}"
        out.print(f"{'holds' if claim['holds'] else 'MISSED'}  {claim['id']}: {figure}", soft_wrap=True)


def print_latency(result: dict[str, Any]) -> None:
    """Milliseconds a request."""
    caption = f"single requests, one after the other; {result['machine']}"
    table = Table("", "median, ms", "95th percentile, ms", caption=caption)
    for row in result["rows"]:
        table.add_row(row["what"], f"{1e3 * row['median_s']:.2f}", f"{1e3 * row['p95_s']:.2f}")
    console().print(table)


def print_study(result: dict[str, Any]) -> None:
    """Means over seeds; of closed worlds what only they can tell; the claims."""
    out, metrics = console(), [name for name in ("HR@10", "NDCG@10") if name in result["means"][0]]
    table = Table("variant", "method", "seeds", *metrics, caption="± is the standard error over seeds")
    for row in result["means"]:
        figures = (with_error(row, name) for name in metrics)
        table.add_row(row["variant"], f"{row['model']} {row['method']}", str(row["seeds"]), *figures)
    out.print(table)
    if "world" in result:
        out.print(_world_table(result["world"]))
        for row in result["world"]:
            told = precondition(row["precondition"])
            out.print(f"{row['variant']}, seed {row['seed']}, before alignment: {told}", soft_wrap=True)
    _print_claims(result["claims"], out)


def _world_table(worlds: list[dict[str, Any]]) -> Table:
    caption = (
        "relevant: share of the items' texts that state the driving fact, before and after; true: any fact, after;"
        " steps: until 90 % are relevant; then HR@10, and the share of the gap from NA_LLM to the oracle that is closed"
    )
    table = Table(caption=caption, caption_justify="left")
    for name in (
        "variant",
        "seed",
        "relevant",
        "true",
        "steps",
        "base",
        "NA_LLM",
        "SeRALM",
        "oracle",
        "gap",
        "minutes",
    ):
        table.add_column(name, no_wrap=name != "variant")
    for row in worlds:
        table.add_row(
            row["variant"],
            str(row["seed"]),
            f"{row['relevant_before']:.2f} → {row['relevant_after']:.2f}",
            f"{row['true_after']:.2f}",
            str(row["steps_to_relevant"] or "never"),
            *(f"{row[name]:.3f}" for name in ("base", "na", "aligned", "oracle")),
            "-" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}",
            f"{(row['shared_s'] + row['wall_s']) / 60:.1f}",
        )
    return table


def precondition(found: dict[str, Any]) -> str:
    """What ``launch.alignment.precondition`` found, as one line."""
    noise = "unknown" if found["signal_to_noise"] is None else f"{found['signal_to_noise']:.2f}"
    shares = ", ".join(f"{share:.0%} at temperature {float(value):.3g}" for value, share in found["best_share"].items())
    return (
        f"the relevant fact gets {found['gap']:+.3f} ± {found['gap_se']:.3f} more reward than the others (signal to"
        f" noise {noise}, {found['pairs']:,} pairs); Eq. 5 would best state it in {shares}"
    )


def with_error(row: dict[str, Any], name: str) -> str:
    """A figure and its standard error, if that is known: of a single seed or user it is not."""
    error = row[f"{name}_se"]
    return f"{row[name]:.4f}" if error is None else f"{row[name]:.4f} ± {error:.4f}"


def _best_epoch(training: dict[str, Any]) -> str:
    if training["best_epoch"] >= 0:
        return str(training["best_epoch"] + 1)
    return "the last" if training["trained_on"] != "train" else "none: the model as it came"


def describe(protocol: dict[str, Any]) -> str:
    """A protocol in words."""
    if protocol["candidates"] == "all":
        seen = "seen items ranked" if protocol["seen"] == "rank" else "seen items left out"
        # A key that came later: results that are older have none.
        repeated = ", repeated targets too" if protocol.get("repeated_targets") == "miss" else ""
        candidates = f"all items, {seen}{repeated}"
    else:
        candidates = (
            f"{protocol['negatives']} {protocol['negatives_from']} negatives (seed {protocol['negatives_seed']},"
            f" none of the user's {protocol['negatives_exclude']})"
        )
    cold = {"rank": "cold targets ranked", "drop": "cold targets dropped", "miss": "cold targets count as misses"}
    return f"{candidates}, {protocol['ties']} ties, {cold[protocol['cold_targets']]}"


def _metric_names(row: dict[str, Any]) -> list[str]:
    return [name for name in row if f"{name}_se" in row]


def _metric_order(name: str) -> tuple[int, int]:
    """By cutoff, the metrics without one last."""
    kind, _, cutoff = name.partition("@")
    return int(cutoff or 2**31), ("HR", "NDCG", "MRR").index(kind)


def _figure(row: dict[str, Any], name: str) -> str:
    return with_error(row, name) if name in row else "-"
