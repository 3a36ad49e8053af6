"""Fig. 2 of the Elephant: what recommenders on PT vectors gain from more pretraining users."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: no screen is needed
import matplotlib.pyplot as plt

METRIC, PICTURE = "NDCG@10", "sizes.png"
WITHOUT = {"random": "--", "trainable vanilla": ":"}  # what no pretraining gives


def draw(folder: Path, means: Sequence[dict[str, Any]], users: Mapping[str, int]) -> Path | None:
    """Write ``sizes.png``: NDCG@10 by the users that stage-PT had; None where no two RECFORMERs differ in them.

    Args:
        folder: where to.
        means: of the study.
        users: that were really trained on, by RECFORMER.
    """
    if len(set(users.values())) < 2:
        return None
    lines: dict[tuple[str, str, str], list[tuple[int, float, float]]] = {}
    for row in means:
        if row["variant"].endswith("PT") and row["model"] != "RECFORMER" and row["recformer"] in users:
            place = users[row["recformer"]]
            key = row["protocol"], row["model"], row["variant"]
            lines.setdefault(key, []).append((place, row[METRIC], row[f"{METRIC}_se"]))
    protocols = list(dict.fromkeys(protocol for protocol, _, _ in lines))
    if not protocols:
        return None
    size = (6 * len(protocols), 4)
    figure, axes = plt.subplots(1, len(protocols), figsize=size, layout="constrained", squeeze=False)
    for axis, protocol in zip(axes[0], protocols, strict=True):
        for (own, model, variant), points in lines.items():
            if own == protocol:
                x, y, error = zip(*sorted(points), strict=True)
                axis.errorbar(x, y, yerr=error, marker="o", capsize=3, label=f"{model}, {variant}")
        for row in means:
            if row["protocol"] == protocol and row["variant"] in WITHOUT:
                style = {"color": "grey", "linestyle": WITHOUT[row["variant"]], "linewidth": 1}
                axis.axhline(row[METRIC], label=f"{row['model']}, {row['variant']}", **style)
        axis.set(title=protocol, xlabel="pretraining users", ylabel=METRIC, xscale="log")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path = folder / PICTURE
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
