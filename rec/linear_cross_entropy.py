"""Full softmax cross-entropy against a big table, exact, without holding its logits."""

import torch
from torch import Tensor

CHUNK_BYTES = 8 * 2**20


class _LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of ``states @ table.T`` without ever holding all logits.

    The loss is a scalar, so the gradient of the logits is known in the forward pass up to one factor: each chunk
    is turned in place from logits into that gradient, used for both inputs' gradients, and overwritten.
    """

    @staticmethod
    def forward(ctx, states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        rows = max(1, (32 if states.is_cuda else 1) * CHUNK_BYTES // (4 * table.shape[0]))
        grad_states, grad_table = torch.empty_like(states), torch.zeros_like(table, dtype=torch.float32)
        # One buffer for all chunks: fresh memory costs more than the arithmetic on it (page faults on CPU).
        buffer = states.new_empty(min(rows, len(states)), table.shape[0])
        total = states.new_zeros((), dtype=torch.float32)
        for begin in range(0, len(states), rows):
            part, target = states[begin : begin + rows], targets[begin : begin + rows, None]
            logits = torch.mm(part, table.T, out=buffer[: len(part)]).float()
            log_total = logits.logsumexp(1, keepdim=True)
            total += (log_total - logits.gather(1, target)).sum()
            gradient = logits.sub_(log_total).exp_()
            gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))
            gradient = gradient.to(states.dtype)
            torch.mm(gradient, table, out=grad_states[begin : begin + rows])
            grad_table.addmm_(gradient.T.float(), part.float())
        ctx.save_for_backward(grad_states, grad_table)
        ctx.count, ctx.table_dtype = len(states), table.dtype
        return total / len(states)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_states, grad_table = ctx.saved_tensors
        scale = grad / ctx.count
        return grad_states * scale.to(grad_states.dtype), (grad_table * scale).to(ctx.table_dtype), None


def linear_cross_entropy(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(states @ table.T)[target], exact over the whole table.

    Args:
        states: [M, D].
        table: [N, D], of the same dtype.
        targets: [M] rows of ``table``.

    Returns:
        A float32 scalar that can be differentiated once, by ``states`` and ``table``.
    """
    return _LinearCrossEntropy.apply(states, table, targets)
