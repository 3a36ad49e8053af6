"""Whether one run is better than another: paired bootstrap over the users that both were evaluated on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rec.evaluation import Metrics
from rec.runtime.errors import UserError

DRAWS, SEED = 10_000, 0


def compare(one: Metrics, other: Metrics, draws: int = DRAWS) -> dict[str, dict[str, float]]:
    """For every metric, the mean difference ``one`` minus ``other``, its 95 % interval, and a two-sided p-value.

    What only one of the two was evaluated on (a target may be cold for one run alone) does not count. Users are drawn
    with replacement, each with all their instances, both runs on the same draw. The p-value is twice the smaller share
    of draws in which the difference has the other sign, or is zero; the difference itself counts as one more draw, so
    that no number of draws makes it zero.

    Raises:
        UserError: if they have no instance in common, or those of one user alone, which say nothing of others.
    """
    one, other = paired(one, other)
    if len(one.users.unique()) < 2:
        raise UserError("the two evaluations have one user in common: nothing can be said of others by that")
    values, others = one.values(), other.values()
    return bootstrap({name: values[name] - others[name] for name in values if name in others}, one.users, draws)


def bootstrap(differences: Mapping[str, Tensor], users: Tensor, draws: int = DRAWS) -> dict[str, dict[str, float]]:
    """The mean, interval and p-value of ``compare`` for any differences [M] of the same instances.

    Args:
        differences: by name, one an instance.
        users: [M] whose the instances are.
        draws: of users.
    """
    generator = torch.Generator().manual_seed(SEED)
    owners = users.unique(return_inverse=True)[1]
    count = int(owners.max()) + 1
    stacked = torch.stack(list(differences.values()))
    by_user = torch.zeros(len(stacked), count, dtype=torch.double).index_add_(1, owners, stacked)
    instances = torch.bincount(owners, minlength=count).double()
    # How often each user is drawn is all that a mean needs; one draw at a time keeps [draws, users] out of memory.
    means = torch.empty(draws, len(stacked), dtype=torch.double)
    for draw in range(draws):
        times = torch.bincount(torch.randint(count, (count,), generator=generator), minlength=count)
        means[draw] = by_user @ times.double() / (instances @ times.double())
    result = {}
    for number, name in enumerate(differences):
        drawn = means[:, number]
        low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
        p = 2 * (min(int((drawn <= 0).sum()), int((drawn >= 0).sum())) + 1) / (draws + 1)
        difference = stacked[number].mean().item()
        result[name] = {"difference": difference, "low": low, "high": high, "p": min(1.0, p)}
    return result


def paired(one: Metrics, other: Metrics) -> tuple[Metrics, Metrics]:
    """Both, on the instances that they share alone, in one order; raises UserError if there are none."""
    rows = [torch.isin(own.instances, theirs.instances).nonzero()[:, 0] for own, theirs in ((one, other), (other, one))]
    if not len(rows[0]):
        raise UserError("the two evaluations have no target in common: they cannot be compared")
    return tuple(own.of(row[own.instances[row].argsort()]) for own, row in zip((one, other), rows, strict=True))
