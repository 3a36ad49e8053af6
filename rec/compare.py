"""Whether one run is better than another: paired bootstrap over the users that both were evaluated on."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rec.evaluation import Metrics

DRAWS, SEED = 10_000, 0


def compare(one: Metrics, other: Metrics, draws: int = DRAWS) -> dict[str, dict[str, float]]:
    """For every metric, the mean difference ``one`` minus ``other``, its 95 % interval, and a two-sided p-value.

    Users are drawn with replacement, each with all their instances, both runs on the same draw. The p-value is twice
    the smaller share of draws in which the difference has the other sign, or is zero.

    Raises:
        ValueError: if the two were not evaluated on the same instances.
    """
    if not torch.equal(one.instances, other.instances):
        raise ValueError("the two evaluations are not of the same instances")
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
        p = 2 * min((drawn <= 0).double().mean().item(), (drawn >= 0).double().mean().item())
        difference = stacked[number].mean().item()
        result[name] = {"difference": difference, "low": low, "high": high, "p": min(1.0, p)}
    return result
