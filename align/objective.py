"""The objective of SeRALM (section 4.4), as pure functions.

The LLM ascends ∇L + α ∇L_KL (Eq. 8):

- ∇L, Eq. 6, is the mean of p(y|x,s)/p(y|x) · ∇ log p(s|x) over sampled texts s.
- L_KL = E_{s~p}[log p_orig(s|x) - log p(s|x)], Eq. 7. Its gradient is NOT that of the sampled difference: that
  one, -∇ log p(s|x), has expectation zero. The score function gives
  ∇L_KL = E[(log p_orig(s|x) - log p(s|x)) ∇ log p(s|x)], and since a token cannot change what came before it,
  each token's score is multiplied by the differences from that token on: the same expectation, less variance.

The recommender ascends log p(y|x,s). Eq. 9 prints ∇ p; Eq. 3 and 4 maximise the sum of log p, so log p it is.
"""

from typing import Literal

import torch
from torch import Tensor


def reward_weights(
    log_p_y_given_xs: Tensor,
    log_p_y_given_x: Tensor,
    baseline: Literal["none", "one", "leave-one-out"] = "none",
    max_ratio: float | None = None,
) -> Tensor:
    """Weights [B] of ∇ log p(s|x) in Eq. 6: p(y|x,s)/p(y|x), clipped, minus a baseline.

    A baseline that does not depend on the sample's own text leaves the expectation of the gradient unchanged,
    since E[∇ log p(s|x)] = 0.

    Args:
        log_p_y_given_xs: [B] log p(y|x,s), from the recommender that reads s.
        log_p_y_given_x: [B] log p(y|x), from the frozen recommender without knowledge.
        baseline: see ``ObjectiveConfig.baseline``; leave-one-out needs B of at least 2.
        max_ratio: clip the ratio at this value.
    """
    ratio = (log_p_y_given_xs - log_p_y_given_x).exp()
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    if baseline == "one":
        return ratio - 1
    if baseline == "leave-one-out":
        return ratio - (ratio.sum() - ratio) / (len(ratio) - 1)
    return ratio


def policy_loss(
    logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, weights: Tensor, alpha: float, n_samples: int
) -> Tensor:
    """A scalar whose negative gradient is the Monte-Carlo estimate of ∇L + α ∇L_KL.

    A sample (x, y) may have several texts, one a fresh item; they are drawn independently, so log p(s|x) is their
    sum and each text's row carries its sample's weight.

    Args:
        logprobs: [M, T] log p of each generated token under the LLM being trained; carries the gradient.
        reference_logprobs: [M, T] the same under the frozen original.
        mask: [M, T] 1 where there is a generated token, 0 where padded.
        weights: [M] from ``reward_weights``.
        alpha: the KL coefficient α.
        n_samples: samples that these M rows belong to.
    """
    difference = (reference_logprobs - logprobs).detach() * mask
    from_here_on = difference.flip(1).cumsum(1).flip(1)
    credit = weights[:, None].to(logprobs.dtype) + alpha * from_here_on
    return -(credit * logprobs * mask).sum() / n_samples


def recommender_loss(log_p_y_given_xs: Tensor) -> Tensor:
    """-mean log p(y|x,s) over samples [B]: Eq. 9 with the log of Eq. 3 and 4."""
    return -log_p_y_given_xs.mean()


def sampled_kl(logprobs: Tensor, reference_logprobs: Tensor, mask: Tensor, ratios: Tensor) -> Tensor:
    """KL(p || p_orig) in nats a text, from texts of an older p.

    The mean of Σ_t log p - log p_orig over rows, weighted by their importance ratios [M] (self-normalised): without
    the weights a stale sample makes the estimate negative as soon as p moves away from it.
    """
    return (ratios * ((logprobs - reference_logprobs) * mask).sum(1)).sum() / ratios.sum()


def importance_ratios(logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[M] p_now(s|x) / p_sampling(s|x): how far the policy has moved since a text was drawn."""
    return ((logprobs - sampling_logprobs) * mask).sum(1).exp()


def effective_sample_fraction(ratios: Tensor) -> Tensor:
    """(Σ r)² / (M Σ r²): 1 when all importance ratios are equal, 1/M when one dominates."""
    return ratios.sum() ** 2 / (len(ratios) * (ratios**2).sum()).clamp_min(torch.finfo(ratios.dtype).tiny)
