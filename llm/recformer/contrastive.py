"""Item-item contrast (RECFORMER, Eq. 8): tell a history's next item from the next items of all other histories.

    L = -1/B Σ_i log( e^{cos(s_i, x_i)/τ} / Σ_j e^{cos(s_i, x_j)/τ} )

with s the vectors of histories, x those of next items, and j over the whole batch: over every rank and every part of a
rank's batch. How the batch is divided changes neither the loss nor its gradient.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from rec.runtime.ranks import Ranks


class _Gather(torch.autograd.Function):
    """[B, D] of every rank as [R B, D]; backward, each rank gets the sum of what all ranks have for its rows."""

    @staticmethod
    def forward(ctx, own: Tensor) -> Tensor:
        ctx.rows = len(own)
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        dist.all_reduce(grad)
        first = dist.get_rank() * ctx.rows
        return grad[first : first + ctx.rows]


def gather_with_gradient(own: Tensor) -> Tensor:
    """The rows [B, D] of all ranks, in the order of ranks, through which gradients flow back to each."""
    return own if Ranks.current().size == 1 else _Gather.apply(own)


def gather(own: Tensor) -> Tensor:
    """The rows [B] of all ranks, in the order of ranks."""
    if Ranks.current().size == 1:
        return own
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own.contiguous())
    return torch.cat(gathered)


def item_contrast(
    histories: Tensor, next_items: Tensor, numbers: Tensor, temperature: float, mask_duplicates: bool
) -> tuple[Tensor, Tensor]:
    """The loss of this rank's histories among the next items of all ranks; the mean over ranks is the batch's.

    Args:
        histories: [B, D] vectors of this rank's histories.
        next_items: [B, D] vectors of the items that follow them.
        numbers: [B] which items these are.
        temperature: τ.
        mask_duplicates: whether another row with the same next item is no negative.

    Returns:
        The scalar loss, and [B] whether each history's own next item has the highest score.
    """
    candidates = F.normalize(gather_with_gradient(next_items), dim=-1)
    logits = F.normalize(histories, dim=-1) @ candidates.T / temperature
    own = Ranks.current().rank * len(histories) + torch.arange(len(histories), device=logits.device)
    if mask_duplicates:
        same = numbers[:, None] == gather(numbers)[None, :]
        same[torch.arange(len(own), device=own.device), own] = False
        logits = logits.masked_fill(same, float("-inf"))
    return F.cross_entropy(logits, own), logits.argmax(1) == own
