"""Where a recommender is good: its figures by kind of target and of history."""

import torch
from torch import Tensor

from rec.batches import fit_counts
from rec.data.prepared import Prepared
from rec.evaluation import Metrics
from rec.protocol import Part, TrainedOn


def groups(data: Prepared, part: Part, trained_on: TrainedOn = "train") -> dict[str, Tensor]:
    """[M] membership (bool) of every instance of ``part`` in each group.

    ``cold``: the target never occurs in training, ``warm`` the others. ``repeat``: the target is in the user's
    history, ``new`` the others. ``head``, ``middle``, ``tail``: the target is among the most popular items that make
    up the first third of the training interactions, the second third, or the rest. ``short``, ``medium``, ``long``:
    thirds of the history lengths.
    """
    users, ends = data.instances(part)
    targets, lengths = data.sequence[ends], ends - data.offsets[users]
    counts = fit_counts(data, trained_on)
    found = {"cold": counts[targets] == 0}
    found["warm"] = ~found["cold"]
    found["repeat"] = data.repeated(part)
    found["new"] = ~found["repeat"]
    third = _popularity_third(counts)[targets]
    found |= {name: third == number for number, name in enumerate(("head", "middle", "tail"))}
    low, high = (torch.quantile(lengths.double(), share) for share in (1 / 3, 2 / 3))
    found |= {
        "short": lengths <= low,
        "medium": (lengths > low) & (lengths <= high),
        "long": lengths > high,
    }
    return found


def break_down(
    metrics: Metrics, data: Prepared, part: Part, trained_on: TrainedOn = "train"
) -> dict[str, dict[str, float]]:
    """The summary of every group that has an instance, with their number ``instances``."""
    result = {}
    for name, members in groups(data, part, trained_on).items():
        own = members[metrics.instances]
        if own.any():
            result[name] = {"instances": int(own.sum()), **metrics.of(own).summary()}
    return result


def _popularity_third(counts: Tensor) -> Tensor:
    """[items + 1] 0, 1 or 2: which third of the training interactions an item belongs to, most popular first.

    ``counts`` [items + 1] are the training interactions of each.
    """
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    third = torch.empty_like(order)
    third[order] = (3 * before // counts.sum().clamp(min=1)).clamp(max=2)
    return third
