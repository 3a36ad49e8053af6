"""A study at a glance: every variant's methods beside each other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt

from launch.seeds import METRICS


def draw(folder: Path, means: Sequence[dict[str, Any]]) -> Path:
    """Write ``variants.png``: means over seeds with their standard errors, variants in the recipe's order.

    Args:
        folder: where it goes.
        means: rows with ``variant``, ``model``, ``method`` and the metrics.
    """
    variants = list(dict.fromkeys(row["variant"] for row in means))
    methods = list(dict.fromkeys((row["model"], row["method"]) for row in means))
    figure, axes = plt.subplots(1, len(METRICS), figsize=(13, 4.5), layout="constrained")
    for axis, metric in zip(axes, METRICS, strict=True):
        for nth, (model, method) in enumerate(methods):
            own = {row["variant"]: row for row in means if (row["model"], row["method"]) == (model, method)}
            # Side by side, so that error bars do not cover each other.
            places = [variants.index(name) + 0.08 * (nth - (len(methods) - 1) / 2) for name in own]
            values = [row[metric] for row in own.values()]
            errors = [row[f"{metric}_se"] or 0.0 for row in own.values()]
            axis.errorbar(places, values, errors, marker="o", capsize=3, linewidth=1, label=f"{model} {method}")
        axis.set_xticks(range(len(variants)), variants, rotation=20, ha="right")
        axis.set(ylabel=metric, title=f"{metric}, ± the standard error over seeds")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    path = folder / "variants.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
