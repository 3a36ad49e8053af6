"""Mean and standard error over seeds, of the rows of any study."""

import statistics
from collections.abc import Sequence
from typing import Any

METRICS = ("HR@10", "NDCG@10")


def means(
    rows: Sequence[dict[str, Any]], by: Sequence[str], metrics: Sequence[str] = METRICS, users_se: bool = False
) -> list[dict[str, Any]]:
    """One row for every group of rows that differ in their seed alone.

    Args:
        rows: with ``by`` and ``metrics`` each, and with ``NAME_se`` if ``users_se``.
        by: what tells groups apart.
        metrics: what is averaged.
        users_se: a single seed keeps its own standard error, over users, instead of None.

    Returns:
        ``by``, ``seeds``, and ``NAME`` and ``NAME_se`` of every metric; in the order of ``rows``.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    found = []
    for key, own in groups.items():
        entry = {**dict(zip(by, key, strict=True)), "seeds": len(own)}
        for name in metrics:
            values = [row[name] for row in own]
            entry[name] = statistics.fmean(values)
            if len(own) > 1:
                entry[f"{name}_se"] = statistics.stdev(values) / len(own) ** 0.5
            else:
                entry[f"{name}_se"] = own[0][f"{name}_se"] if users_se else None
        found.append(entry)
    return found
