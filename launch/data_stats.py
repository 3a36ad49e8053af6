"""What is in a prepared folder: figures for people and programs, and one picture."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from rec.data.prepared import Prepared
from rec.data.splits import PART_NAMES, TRAIN
from rec.runtime import files
from rec.runtime.errors import UserError

matplotlib.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

PICTURE, RESULT = "stats.png", "result.json"
QUANTILES = {"min": 0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "max": 1}
UNITS = {"day": 86_400, "hour": 3_600, "minute": 60, "second": 1}
# April 1970: no data set of interactions is that old, but positions in a sequence are that small.
SMALLEST_TIME = 10_000_000
COLORS = ("#2a6f97", "#e76f51")


def describe(data: Prepared, top: int = 10) -> dict[str, Any]:
    """Every figure that ``show`` prints, as plain numbers and texts.

    Shares are between 0 and 1. ``density`` is interactions / (users * items); ``repeats`` is the share of
    interactions with an item that the user had before; ``ties`` the share at the same time as the user's one before.
    """
    offsets, sequence, times = data.offsets.numpy(), data.sequence.numpy(), data.timestamps.numpy()
    lengths = np.diff(offsets)
    users = np.repeat(np.arange(data.n_users), lengths)
    first = np.zeros(len(sequence), dtype=bool)
    first[offsets[:-1]] = True
    distinct = len(np.unique(users * (data.n_items + 1) + sequence))
    popularity = popularity_of(data)
    order = np.argsort(-popularity, kind="stable")
    trained = np.unique(sequence[data.part.numpy() == TRAIN])
    parts = np.bincount(data.part.numpy(), minlength=len(PART_NAMES))
    return {
        "users": data.n_users,
        "items": data.n_items,
        "interactions": len(sequence),
        "density": len(sequence) / data.n_users / data.n_items,
        "lengths": {"mean": float(lengths.mean()), **_quantiles(lengths)},
        "popularity": {"mean": float(popularity.mean()), **_quantiles(popularity)},
        "share_of_top_items": {
            f"{share:.0%}": float(popularity[order[: max(1, int(share * data.n_items))]].sum() / len(sequence))
            for share in (0.01, 0.1)
        },
        "repeats": 1 - distinct / len(sequence),
        "time": _describe_times(times, first),
        "split": data.meta["filters"]["split"],
        "parts": dict(zip(PART_NAMES, parts.tolist(), strict=True)),
        "items_in_training": len(trained),
        "cold_targets": {
            split: int((~np.isin(data.targets(split).numpy(), trained)).sum()) for split in ("valid", "test")
        },
        "text": _describe_texts(data),
        "top_items": [_top_item(data, int(item), int(popularity[item])) for item in order[:top]],
        "source": data.meta["source"],
        "filters": data.meta["filters"],
        "left_out": data.meta["counts"]["left_out"],
    }


def popularity_of(data: Prepared) -> np.ndarray:
    """[items] interactions of item number i + 1, in all parts."""
    return np.bincount(data.sequence.numpy() - 1, minlength=data.n_items)


def show(stats: dict[str, Any], title: str, console: Console | None = None) -> None:
    """Print the figures, for people."""
    console = console or _console()
    facts = Table(title=title, title_justify="left", show_header=False)
    facts.add_column(style="bold")
    facts.add_column()
    for name in ("users", "items", "interactions"):
        facts.add_row(name, f"{stats[name]:,}")
    facts.add_row("density", f"{stats['density']:.4%}")
    facts.add_row("a user's interactions", _line(stats["lengths"]))
    facts.add_row("an item's interactions", _line(stats["popularity"]))
    shares = ", ".join(f"top {top} of items: {share:.1%}" for top, share in stats["share_of_top_items"].items())
    facts.add_row("share of interactions", shares)
    facts.add_row("repeated items", f"{stats['repeats']:.2%} of interactions")
    facts.add_row("time", _time_line(stats["time"]))
    facts.add_row(f"split: {stats['split']}", ", ".join(f"{name} {n:,}" for name, n in stats["parts"].items() if n))
    facts.add_row("items in training", f"{stats['items_in_training']:,}")
    facts.add_row("cold targets", ", ".join(f"{split} {count:,}" for split, count in stats["cold_targets"].items()))
    left_out = ", ".join(f"{name.replace('_', ' ')} {n:,}" for name, n in stats["left_out"].items() if n)
    facts.add_row("left out", left_out or "nothing")
    for name, text in stats["text"].items():
        words = f", {text['words']:.1f} words where filled" if text["filled"] else ""
        facts.add_row(f"text: {name}", f"{text['filled']:.1%} filled{words}")
    if not stats["text"]:
        facts.add_row("text", "the items have no text columns")
    console.print(facts)
    top = Table(title="Most frequent items", title_justify="left")
    top.add_column("interactions", justify="right", no_wrap=True, min_width=12)
    top.add_column("item_id", no_wrap=True, min_width=10)
    top.add_column("text", overflow="ellipsis", no_wrap=True)
    for item in stats["top_items"]:
        top.add_row(f"{item['interactions']:,}", item["item_id"], item["text"])
    console.print(top)


def draw(data: Prepared, title: str, path: Path) -> None:
    """A histogram of lengths (logarithmic bins) and popularity against rank (both axes logarithmic), as PNG."""
    lengths, popularity = data.offsets.diff().numpy(), np.sort(popularity_of(data))[::-1]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    # Lengths are whole numbers: the bins of short ones hold one each, with the number in the middle.
    edges = np.unique(np.geomspace(lengths.min(), lengths.max() + 1, 40).round()) - 0.5
    left.hist(lengths, bins=edges, color=COLORS[0], edgecolor="white", linewidth=0.4)
    left.axvline(np.median(lengths), color=COLORS[1], label=f"median {np.median(lengths):g}")
    left.set(xscale="log", xlabel="interactions of a user", ylabel="users", title="Sequence lengths")
    left.legend(frameon=False)
    right.loglog(np.arange(1, len(popularity) + 1), popularity, color=COLORS[0])
    right.set(xlabel="rank of the item", ylabel="interactions", title="Item popularity")
    for axes in (left, right):
        axes.grid(alpha=0.25, which="major")
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":
                low, high = axis.get_view_interval()
                axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,), numticks=15))
                axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(folder: Path, out: Path | None, command: str) -> None:
    """Print the summary of a prepared folder; write the picture and ``result.json`` (into ``folder/stats`` if None).

    Raises:
        UserError: if ``folder`` is no prepared folder or ``out`` cannot be written.
    """
    data = Prepared.load(folder)
    stats = describe(data)
    out = out or folder / "stats"
    title = (
        f"{folder.resolve().name}: {data.n_users:,} users, {data.n_items:,} items, {len(data.sequence):,} interactions"
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        draw(data, title, out / PICTURE)
        files.write_json(out / RESULT, {"command": command, "data": str(folder), "rows": [stats]})
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}; name another folder with --out") from error
    console = _console()
    show(stats, str(folder), console)
    console.print(f"Also in {out}: {PICTURE}, {RESULT}", soft_wrap=True)


def _console() -> Console:
    # Titles of items hold brackets and colons, which are no markup here.
    return Console(width=110, highlight=False, markup=False, emoji=False)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    found = np.quantile(values, list(QUANTILES.values()))
    return {name: float(value) for name, value in zip(QUANTILES, found, strict=True)}


def _describe_times(times: np.ndarray, first: np.ndarray) -> dict[str, Any]:
    ties = float((np.diff(times, prepend=times[:1])[~first] == 0).mean()) if not first.all() else 0.0
    if abs(int(times.max())) < SMALLEST_TIME:
        return {"kind": "positions", "first": int(times.min()), "last": int(times.max()), "ties": ties}
    unit = next(name for name, seconds in UNITS.items() if not (times % seconds).any())
    return {"kind": unit, "first": _date(int(times.min())), "last": _date(int(times.max())), "ties": ties}


def _date(seconds: int) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"
    except (OverflowError, ValueError, OSError):
        return str(seconds)


def _describe_texts(data: Prepared) -> dict[str, dict[str, float]]:
    described = {}
    for name in data.items.column_names:
        if name != "item_id":
            texts = data.items[name].filter(pc.not_equal(data.items[name], ""))
            words = pc.count_substring_regex(texts, r"\S+")
            described[name] = {"filled": len(texts) / data.n_items, "words": pc.mean(words).as_py() or 0.0}
    return described


def _top_item(data: Prepared, index: int, count: int) -> dict[str, Any]:
    row = data.items.slice(index, 1).to_pylist()[0]
    item_id = row.pop("item_id")
    return {"item_id": item_id, "interactions": count, "text": next(filter(None, row.values()), "")}


def _line(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.1f}".removesuffix(".0") for name, value in numbers.items())


def _time_line(time: dict[str, Any]) -> str:
    ties = f"{time['ties']:.1%} at the same time as the one before"
    if time["kind"] == "positions":
        return f"positions from {time['first']:,} to {time['last']:,}, no times; {ties}"
    return f"{time['first']} to {time['last']} UTC, to the {time['kind']}; {ties}"
