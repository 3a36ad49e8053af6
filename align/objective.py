"""The objective of SeRALM (section 4.4), as pure functions.

The LLM ascends ∇L + α ∇L_KL (Eq. 8):

- ∇L, Eq. 6, is the mean of p(y|x,s)/p(y|x) · ∇ log p(s|x) over sampled texts s.
- L_KL = E_{s~p}[log p_orig(s|x) - log p(s|x)], Eq. 7. Its gradient is NOT that of the sampled difference: that
  one, -∇ log p(s|x), has expectation zero. The score function gives
  ∇L_KL = E[(log p_orig(s|x) - log p(s|x)) ∇ log p(s|x)], and since a token cannot change what came before it,
  each token's score is multiplied by the differences from that token on: the same expectation, less variance.
  Less still with the exact divergence K_t over the vocabulary at each place t of a sampled text:
  ∇L_KL = -E[Σ_t ∇K_t + Σ_t (Σ_{t' > t} K_t') ∇ log p(s_t|x, s_<t)].

The recommender ascends log p(y|x,s). Eq. 9 prints ∇ p; Eq. 3 and 4 maximise the sum of log p, so log p it is.

Texts of an older policy stand for the present one when each is weighted by p_now(s|x) / p_then(s|x), s being all texts
of one history together. The weights are truncated, which trades some bias for a bounded variance.
"""

import math
from typing import Literal

import torch
from torch import Tensor

Denominator = Literal["base", "group"]
Baseline = Literal["none", "one", "leave-one-out"]
LARGEST_LOG = 700.0  # of what a double can hold


def reward_weights(
    log_p_y_given_xs: Tensor,
    log_p_y_given_x: Tensor,
    baseline: Baseline = "none",
    max_ratio: float | None = None,
    denominator: Denominator = "base",
) -> Tensor:
    """Weights [B, k] of ∇ log p(s|x) in Eq. 6: p(y|x,s)/p(y|x), clipped, minus a baseline.

    A baseline that does not depend on the sample's own text leaves the expectation of the gradient unchanged,
    since E[∇ log p(s|x)] = 0.

    Args:
        log_p_y_given_xs: [B, k] log p(y|x,s) of k independent texts, from the recommender that reads s.
        log_p_y_given_x: [B] log p(y|x), from the frozen recommender without knowledge.
        baseline: see ``ObjectiveConfig.baseline``; leave-one-out is the mean of the pair's other texts or, where there
            is one text a pair, of the other pairs, which needs B of at least 2.
        max_ratio: clip the ratio at this value.
        denominator: ``base`` divides by the frozen recommender's p(y|x); ``group`` by the mean of p(y|x,s) over the k
            texts, Eq. 5's own estimate of it. That holds each text's own likelihood, a bias that vanishes as 1/k.
    """
    below = log_p_y_given_x[:, None] if denominator == "base" else log_mean_exp(log_p_y_given_xs)
    ratio = (log_p_y_given_xs - below).exp()
    if max_ratio is not None:
        ratio = ratio.clamp(max=max_ratio)
    if baseline == "one":
        return ratio - 1
    if baseline == "leave-one-out":
        group = 1 if ratio.shape[1] > 1 else 0
        weights = ratio - (ratio.sum(group, keepdim=True) - ratio) / (ratio.shape[group] - 1)
        # Of equal rewards rounding alone is left, which ``scaled`` would make as large as any reward.
        return weights.masked_fill(weights.abs() < 1e-6 * ratio, 0.0)
    return ratio


def scaled(weights: Tensor) -> Tensor:
    """Weights [B, k] over their root mean square; as they are where all of them are 0.

    A step's own samples are part of what divides them: the direction of the expected gradient is kept up to 1 / (B k).
    """
    size = weights.square().mean().sqrt()
    return weights / size if size > 0 else weights


def log_mean_exp(values: Tensor) -> Tensor:
    """[B, 1] log of the mean over k of exp(values [B, k])."""
    return values.logsumexp(1, keepdim=True) - torch.tensor(values.shape[1]).log()


def policy_loss(
    logprobs: Tensor,
    reference_logprobs: Tensor,
    mask: Tensor,
    weights: Tensor,
    alpha: float,
    n_samples: int,
    token_kl: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """A scalar whose negative gradient is the Monte-Carlo estimate of ∇L + α ∇L_KL.

    A sample (x, y, s) may have several texts, one a fresh item; they are drawn independently, so log p(s|x) is their
    sum and each text's row carries its sample's weight. A text that several samples share is one row with the sum of
    their weights: to a sample without it its score adds nothing in expectation. ``row_weights`` makes both.

    Args:
        logprobs: [M, T] log p of each generated token under the LLM being trained; carries the gradient.
        reference_logprobs: [M, T] the same under the frozen original.
        mask: [M, T] 1 where there is a generated token, 0 where padded.
        weights: [M] weight of each text.
        alpha: the KL coefficient α.
        n_samples: samples that these M rows belong to.
        token_kl: [M, T] from ``align.logprobs``; None estimates the KL from the sampled tokens.
        shares: [M] samples that the text counts for, each as much as its importance; None is 1.
    """
    if token_kl is None:
        cost, after = (logprobs - reference_logprobs).detach() * mask, 0.0
    else:
        # A token's own place is differentiated directly, its score answers for what comes after.
        cost = token_kl.detach() * mask
        after = cost
    penalty = alpha * (torch.ones_like(weights) if shares is None else shares)[:, None].to(logprobs.dtype)
    # Sums of what is left of each row; as a product, because a GPU's cumsum has no deterministic kernel.
    from_here_on = cost @ torch.ones(2 * [cost.shape[1]], dtype=cost.dtype, device=cost.device).tril() - after
    gain = (weights[:, None].to(logprobs.dtype) - penalty * from_here_on) * logprobs * mask
    if token_kl is not None:
        gain = gain - penalty * token_kl * mask
    return -gain.sum() / n_samples


def row_weights(
    weights: Tensor, importance: Tensor, texts: Tensor, samples: Tensor, n_texts: int
) -> tuple[Tensor, Tensor]:
    """``weights`` and ``shares`` [M] of texts, for ``policy_loss``, from those of the samples that hold them.

    Args:
        weights: [S] from ``reward_weights``.
        importance: [S] from ``importance_weights``, or ones.
        texts: [E] a text that a sample holds, by its row.
        samples: [E] that sample.
        n_texts: M.
    """
    shares = importance.new_zeros(n_texts).index_add_(0, texts, importance[samples])
    return shares.new_zeros(n_texts).index_add_(0, texts, (importance * weights)[samples]), shares


def recommender_loss(log_p_y_given_xs: Tensor) -> Tensor:
    """-mean log p(y|x,s) over samples [B]: Eq. 9 with the log of Eq. 3 and 4."""
    return -log_p_y_given_xs.mean()


def sampled_kl(from_original: Tensor, ratios: Tensor) -> Tensor:
    """KL(p || p_orig) in nats a text, from texts of an older p.

    The mean of log p(s|x) - log p_orig(s|x) [M], weighted by the texts' importance ratios, logs [M] of which are given
    (self-normalised): without the weights a stale sample makes the estimate negative as soon as p moves away from it.
    """
    return (ratios.softmax(0) * from_original).sum()


def log_ratios(logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[M] log of p_now(s|x) / p_then(s|x): how far the policy has moved since a text was drawn.

    As logs, and in double precision: the ratio of a long text can be more than any number.
    """
    return ((logprobs - sampling_logprobs).double() * mask).sum(1)


def draw_log_ratios(ratios: Tensor, texts: Tensor, samples: Tensor, n_samples: int) -> Tensor:
    """[S] log of the product of the ratios of all texts of each draw.

    Args:
        ratios: [M] from ``log_ratios``.
        texts: [E] a text that a draw holds, by its row.
        samples: [E] that draw.
        n_samples: S.
    """
    return ratios.new_zeros(n_samples).index_add_(0, samples, ratios[texts])


def importance_weights(ratios: Tensor, cap: float) -> Tensor:
    """[S] truncated importance of draws, from ``draw_log_ratios``: ``cap`` at most."""
    return ratios.clamp(max=math.log(cap)).exp()


def mismatch_kl(logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor) -> Tensor:
    """[M] sums over tokens of r - 1 - log r with r = p_now / p_then: estimates of KL(p_then || p_now), never negative.

    On texts of the present weights it is what two implementations of one model differ by.
    """
    log_r = ((logprobs - sampling_logprobs).double() * mask).clamp(max=LARGEST_LOG)
    return (log_r.exp() - 1 - log_r).sum(1)


def effective_sample_fraction(ratios: Tensor) -> Tensor:
    """(Σ r)² / (M Σ r²), from logs [M] of r: 1 when all importance ratios are equal, 1/M when one dominates."""
    return (2 * ratios.logsumexp(0) - (2 * ratios).logsumexp(0)).exp() / len(ratios)


def mean_ratio(ratios: Tensor) -> Tensor:
    """Mean of r, from logs [M] of it; at most what a double can hold."""
    return (ratios.double().logsumexp(0) - math.log(len(ratios))).clamp(max=LARGEST_LOG).exp()
