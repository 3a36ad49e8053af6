"""log p of chosen tokens, and the KL to the original at each place, of many places and a large vocabulary.

Softmaxes of all places are never held: each is made for a chunk of rows, forwards and again backwards. What stays are
the logits, and backwards their gradient.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_BYTES = 2**24


class _Scored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, next_ids: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor]:
        total, kl = logits.new_empty(len(logits)), logits.new_zeros(len(logits))
        of_reference = logits.new_empty(0 if reference is None else len(logits))
        for rows in _chunks(logits):
            total[rows] = logits[rows].logsumexp(-1)
            if reference is not None:
                of_reference[rows] = reference[rows].logsumexp(-1)
                log_p = logits[rows] - total[rows, None]
                ahead = log_p - reference[rows]
                kl[rows] = ahead.add_(of_reference[rows, None]).mul_(log_p.exp_()).sum(-1)
        ctx.save_for_backward(logits, next_ids, reference, total, of_reference, kl)
        return logits.gather(-1, next_ids[:, None]).squeeze(-1) - total, kl

    @staticmethod
    def backward(ctx, by_chosen: Tensor, by_kl: Tensor) -> tuple[Tensor, None, None]:
        logits, next_ids, reference, total, of_reference, kl = ctx.saved_tensors
        grad = torch.empty_like(logits)
        for rows in _chunks(logits):
            log_p, part = logits[rows] - total[rows, None], grad[rows]
            part.fill_(0).sub_(by_chosen[rows, None])
            if reference is not None:
                # ∂KL/∂logits = p (log p - log p_orig - KL)
                ahead = (log_p - reference[rows]).add_((of_reference[rows] - kl[rows])[:, None])
                part.add_(ahead.mul_(by_kl[rows, None]))
            part.mul_(log_p.exp_())
        # Every row has one place of its own; a GPU's scatter_add would not know, and has no deterministic kernel.
        grad[torch.arange(len(grad), device=grad.device), next_ids] += by_chosen
        return grad, None, None


def scored(logits: Tensor, next_ids: Tensor, reference: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """[P] log p of the tokens ``next_ids`` [P], and [P] KL(p || p_orig) of the next token over the whole vocabulary.

    Args:
        logits: [P, V] of the tokens after P places; both results can be differentiated by them, once.
        next_ids: [P].
        reference: [P, V] the same under the original; without them the KL is 0.

    Returns:
        Both in nats.
    """
    return _Scored.apply(logits, next_ids, reference)


def _chunks(logits: Tensor) -> Iterator[slice]:
    rows = max(1, CHUNK_BYTES // (logits.element_size() * logits.shape[1]))
    return (slice(begin, begin + rows) for begin in range(0, len(logits), rows))
