"""Losses over (state, true item): the one place that says what a recommender's training minimises.

Every loss takes states [M, D], the item table [N, D] and targets [M] (rows of the table), and gives the mean over
the M targets. Negatives are drawn from torch's global generator, all at once.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from rec.linear_cross_entropy import linear_cross_entropy
from rec.runtime.config import Section


class LossConfig(Section):
    """What training minimises."""

    name: Literal["cross-entropy", "sampled-softmax", "bce", "gbce", "bpr"] = "cross-entropy"
    """Full softmax over all items (exact); softmax over the target and the negatives; binary cross-entropy; gBCE
    (gSASRec, Petrov & Macdonald 2023), BCE with a calibrated positive; Bayesian personalised ranking."""
    negatives: int = Field(256, ge=1)
    """Negatives a target; no part in cross-entropy."""
    sampling: Literal["uniform", "popularity", "in-batch"] = "uniform"
    """All items alike, by their number of training interactions, or the other targets of the batch."""
    shared: bool = True
    """One set of negatives for the whole batch (one matrix product), or a set of its own for every target."""
    log_q: bool = False
    """sampled-softmax: subtract log(expected count) from each negative's logit, so that it estimates the full one."""
    calibration: float = Field(0.75, ge=0, le=1)
    """gBCE's t: 0 is BCE, 1 is fully calibrated."""

    def unused(self) -> list[str]:
        """Options that are set and mean nothing to this loss."""
        used = ("name", *USED.get(self.name, ()), *(() if self.name == "cross-entropy" else OF_NEGATIVES))
        fields = type(self).model_fields.items()
        return [name for name, field in fields if name not in used and getattr(self, name) != field.default]


OF_NEGATIVES = ("negatives", "sampling", "shared")
USED = {"sampled-softmax": ("log_q",), "gbce": ("calibration",)}


class Loss(Protocol):
    """(states [M, D], table [N, D], targets [M]) → mean over targets."""

    def __call__(self, states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        """The scalar loss."""
        ...


def make_loss(config: LossConfig, popularity: Tensor) -> Loss:
    """The loss that ``config`` names.

    Args:
        config: which, and how negatives are drawn.
        popularity: [N] training interactions of each item.
    """
    if config.name == "cross-entropy":
        return linear_cross_entropy
    return NegativeSampling(config, popularity.float())


@dataclass
class NegativeSampling:
    """Losses against drawn negatives; a negative that is the target itself is masked, never another true item."""

    config: LossConfig
    popularity: Tensor

    def __call__(self, states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        negatives = self.draw(targets)
        # Not table[…]: with several threads a CPU adds up what comes back for the same row in any order.
        positive = (states * F.embedding(targets, table)).sum(-1, dtype=torch.float32)
        if negatives.dim() == 1:
            scores = (states @ F.embedding(negatives, table).T).float()
        else:
            scores = torch.einsum("md,mkd->mk", states, F.embedding(negatives, table)).float()
        hits = negatives == targets[:, None]
        if self.config.name == "sampled-softmax":
            if self.config.log_q:
                scores = scores - self.log_expected_count(negatives)
            return sampled_softmax(positive, scores.masked_fill(hits, float("-inf")))
        if self.config.name == "bpr":
            return bpr(positive, scores, hits)
        beta = 1.0
        if self.config.name == "gbce":
            beta = gbce_beta(self.config.negatives, table.shape[0], self.config.calibration)
        return binary_cross_entropy(positive, scores, hits, beta)

    def draw(self, targets: Tensor) -> Tensor:
        """Rows of the table: [k] shared by the batch, or [M, k]."""
        shape = (self.config.negatives,) if self.config.shared else (len(targets), self.config.negatives)
        total = shape[0] if self.config.shared else shape[0] * shape[1]
        if self.config.sampling == "uniform":
            return torch.randint(len(self.popularity), shape, device=targets.device)
        if self.config.sampling == "in-batch":
            return targets[torch.randint(len(targets), shape, device=targets.device)]
        weights = self.popularity.to(targets.device)
        return torch.multinomial(weights, total, replacement=True).view(shape)

    def log_expected_count(self, negatives: Tensor) -> Tensor:
        """log of how often each drawn item is expected among the k negatives of a target.

        For ``in-batch`` a batch's targets follow the popularity, so popularity is their proposal too.
        """
        weights = torch.ones_like(self.popularity) if self.config.sampling == "uniform" else self.popularity
        probabilities = (weights / weights.sum()).to(negatives.device)
        return (self.config.negatives * probabilities[negatives]).log()


def sampled_softmax(positive: Tensor, negatives: Tensor) -> Tensor:
    """Mean of -log(e^p / (e^p + Σ e^n)) for positive scores [M] and negative scores [M, k]; -inf leaves one out."""
    return (torch.logaddexp(positive, negatives.logsumexp(1)) - positive).mean()


def bpr(positive: Tensor, negatives: Tensor, hits: Tensor) -> Tensor:
    """Mean of -log σ(p - n) over all pairs; ``hits`` [M, k] marks negatives that are the target, and do not count."""
    losses = F.softplus(negatives - positive[:, None]).masked_fill(hits, 0.0)
    return losses.sum() / (~hits).sum().clamp(min=1)


def binary_cross_entropy(positive: Tensor, negatives: Tensor, hits: Tensor, beta: float = 1.0) -> Tensor:
    """gBCE: mean over targets of -(log σ^β(p) + Σ log(1 - σ(n))) / (k + 1); β = 1 is BCE.

    log σ^β is β log σ, which float32 holds; gSASRec's reference code goes through float64 logits instead.
    """
    own = beta * F.softplus(-positive)
    others = F.softplus(negatives).masked_fill(hits, 0.0).sum(1)
    return ((own + others) / (negatives.shape[1] + 1)).mean()


def gbce_beta(negatives: int, n_items: int, calibration: float) -> float:
    """β = α (t (1 - 1/α) + 1/α) with α = k / (N - 1), the sampling rate (gSASRec, Eq. 19)."""
    alpha = min(1.0, negatives / max(1, n_items - 1))
    return alpha * (calibration * (1 - 1 / alpha) + 1 / alpha)
