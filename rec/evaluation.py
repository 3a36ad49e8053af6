"""Full-ranking leave-one-out evaluation: HR@k, NDCG@k, MRR, with standard errors.

Every user's held-out item is ranked among all items of the data set. Scores of one batch of users exist at a
time, never [users, items].

Ties: the target's rank is the mean of the best and the worst place that its ties allow,
``rank = 1 + #{better} + #{equal others} / 2``. A constant model gets what a random one gets, not a perfect score.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rec.config import EvaluateConfig
from rec.data.prepared import Prepared, Split
from rec.models.base import SequenceRecommender


@dataclass(frozen=True)
class Metrics:
    """Figures of one evaluation.

    Attributes:
        ranks: [users] the (possibly fractional) rank of each user's held-out item, best is 1.
        cutoffs: the k of HR@k and NDCG@k.
    """

    ranks: Tensor
    cutoffs: tuple[int, ...]

    def per_user(self) -> dict[str, Tensor]:
        """[users] values of each metric."""
        values = {}
        for k in self.cutoffs:
            hit = (self.ranks <= k).double()
            values[f"HR@{k}"] = hit
            values[f"NDCG@{k}"] = hit / torch.log2(1 + self.ranks)
        values["MRR"] = 1 / self.ranks
        return values

    def summary(self) -> dict[str, float]:
        """Means and standard errors (``NAME`` and ``NAME_se``) over users."""
        result = {}
        for name, value in self.per_user().items():
            result[name] = float(value.mean())
            result[f"{name}_se"] = float(value.std() / len(value) ** 0.5) if len(value) > 1 else 0.0
        return result

    def __getitem__(self, name: str) -> float:
        return float(self.per_user()[name].mean())


def protocol(split: Split, config: EvaluateConfig) -> dict[str, Any]:
    """What was measured, in words that a result line can carry."""
    return {
        "split": f"leave-one-out, {split} item",
        "candidates": "all items",
        "seen_items": {"rank": "ranked", "mask": "left out"}[config.seen],
        "ties": "mean rank",
    }


def ranks_of(scores: Tensor, targets: Tensor) -> Tensor:
    """Mean ranks [B] (float64) of ``targets`` [B] (column numbers) in ``scores`` [B, N]; -inf is no candidate."""
    if scores.isnan().any():
        raise FloatingPointError("scores are not a number: the model has diverged")
    own = scores.gather(1, targets[:, None])
    better = (scores > own).sum(1)
    equal = (scores == own).sum(1) - 1
    return 1 + better.double() + equal.double() / 2


@torch.no_grad()
def evaluate(
    model: SequenceRecommender,
    data: Prepared,
    split: Split,
    config: EvaluateConfig,
    users: Sequence[int] | None = None,
) -> Metrics:
    """Rank each user's held-out item of ``split`` among all items.

    Args:
        model: put into evaluation mode for the time.
        data: where histories and targets come from.
        split: the validation or the test item; the test history includes the validation item.
        config: treatment of seen items, cutoffs, batch size.
        users: user numbers; all by default.
    """
    device = next(model.parameters()).device
    chosen = torch.arange(data.n_users) if users is None else torch.as_tensor(users)
    targets, was_training = data.targets(split)[chosen], model.training
    model.eval()
    ranks = []
    for part, target in zip(chosen.split(config.batch_size), targets.split(config.batch_size), strict=True):
        items, lengths = data.histories(split, part, model.config.max_length)
        scores = model.scores(model.last_states(items.to(device), lengths.to(device))).float()
        if config.seen == "mask":
            everything, _ = data.histories(split, part, len(data.sequence))
            scores = _mask_seen(scores, everything.to(device), target.to(device))
        ranks.append(ranks_of(scores, target.to(device) - 1).cpu())
    model.train(was_training)
    return Metrics(torch.cat(ranks), config.cutoffs)


def _mask_seen(scores: Tensor, history: Tensor, targets: Tensor) -> Tensor:
    """Scores with the history's items at -inf, except the target itself (it may be a repeat)."""
    own = scores.gather(1, targets[:, None] - 1)
    padded = torch.cat([scores.new_zeros(len(scores), 1), scores], dim=1)
    masked = padded.scatter(1, history, float("-inf"))[:, 1:]
    return masked.scatter(1, targets[:, None] - 1, own)
