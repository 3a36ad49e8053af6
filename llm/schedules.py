"""Learning rate and λ as pure functions of the step: nothing to save, nothing to restore (LMRec, appendix A)."""

import math


def cosine_decay(done: float, final: float) -> float:
    """From 1 at ``done`` = 0 to ``final`` at ``done`` = 1 along half a cosine."""
    return final + (1 - final) / 2 * (1 + math.cos(math.pi * done))


def learning_rate(step: int, total: int, peak: float, warmup_fraction: float, final: float = 0.1) -> float:
    """Linear warm-up to ``peak`` over the first steps, then cosine decay to ``final`` x ``peak``.

    Args:
        step: finished steps, from 0 to ``total``.
        total: of the run.
        peak: highest learning rate.
        warmup_fraction: share of ``total`` that the warm-up takes, one step at least.
        final: where the decay ends, as a share of ``peak``.
    """
    warmup = max(1, round(warmup_fraction * total))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * cosine_decay((step - warmup) / max(1, total - warmup), final)


def recommendation_weight(step: int, total: int, first: float, final: float = 0.1) -> float:
    """λ of Eq. 6 at ``step``: the same cosine, without a warm-up. LMRec does not say where it ends; where the learning
    rate does, by default."""
    return first * cosine_decay(step / max(1, total), final)
