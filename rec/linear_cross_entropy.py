"""Full softmax cross-entropy against a big table, exact, without ever holding all logits.

The loss is a scalar, so the gradient of the logits is known in the forward pass up to one factor. With
e = exp(logits), z = Σe over the table and y the target, that gradient is e/z - [y]. Each chunk of rows is one
buffer: logits, then e in place, then two matrix products into the gradients of states and table; dividing by z
happens on the thin sides of those products, and [y] is one gather and one scatter. On 2 CPU cores what remains is
three matrix products and one exp.

On a GPU the softmax of a chunk is one kernel, faster than the steps that it is made of, and its products want rows that
begin at multiples of 16 bytes: with 50,258 tokens the loss takes twice as long as with 50,304.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 18 * 2**20
SLICE_ROWS = 4096
# Fewer rows at a time would read a table of hundreds of thousands of items from memory again for each few of them.
LEAST_ROWS = 64
GPU_CHUNK_BYTES = 288 * 2**20
GPU_COLUMN_MULTIPLE = 64
# exp must neither overflow nor vanish; up to here no row needs its maximum subtracted first.
SAFE_LOGIT = 60.0
# oneDNN, which multiplies bfloat16, compiles a kernel for every new number of rows, at 10 ms each.
ROW_MULTIPLE = 64


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(states.device.type) if _autocast(states) else states.dtype
        with torch.autocast(states.device.type, enabled=False):
            compute = _on_gpu if states.is_cuda else _on_cpu
            loss, grad_states, grad_table = compute(
                states.to(dtype), table.to(dtype), targets, *ctx.needs_input_grad[:2]
            )
        ctx.save_for_backward(
            None if grad_states is None else grad_states.to(states.dtype),
            None if grad_table is None else grad_table.to(table.dtype),
        )
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # In place: a copy of a table's gradient is not little memory.
        by_states, by_table = (None if own is None else own.mul_(grad.to(own.dtype)) for own in ctx.saved_tensors)
        return by_states, by_table, None


def linear_cross_entropy(states: Tensor, table: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(states @ table.T)[target], exact over the whole table.

    Under autocast the matrix products run in its type; sums over the table and the table's gradient stay float32.

    Args:
        states: [M, D].
        table: [N, D].
        targets: [M] rows of ``table``.

    Returns:
        A float32 scalar that can be differentiated once, by ``states`` and ``table``.
    """
    return _LinearCrossEntropy.apply(states, table, targets)


def _on_cpu(
    states: Tensor, table: Tensor, targets: Tensor, by_states: bool, by_table: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss and those of its gradients that somebody asks for: each is one of three matrix products."""
    rows = max(LEAST_ROWS, CHUNK_BYTES // (states.element_size() * table.shape[0]))
    if few_shapes := states.dtype != torch.float32:
        rows += -rows % ROW_MULTIPLE
    # One buffer for all chunks: fresh memory costs more than the arithmetic on it (page faults).
    buffer = states.new_empty(min(rows, len(states) + -len(states) % ROW_MULTIPLE), table.shape[0])
    shift = _needs_shift(states, table)
    grad_states, grad_table = _empty_gradients(states, table, by_states, by_table)
    log_totals = []
    for begin in range(0, len(states), rows):
        part = states[begin : begin + rows]
        kept = len(part)
        if few_shapes:  # A row of zeros adds nothing to the table's gradient; elsewhere it is cut off again.
            part = F.pad(part, (0, 0, 0, -kept % ROW_MULTIPLE))
        e = torch.mm(part, table.T, out=buffer[: len(part)])
        top = e.amax(1, keepdim=True) if shift else None
        if shift:
            e.sub_(top)
        total = _row_sums(e.exp_())
        if by_states:
            torch.div(torch.mm(e, table)[:kept], total[:kept], out=grad_states[begin : begin + rows])
        if by_table:
            _add_product(grad_table, e, (part / total).to(e.dtype))
        log_totals.append((total.log_() if top is None else total.log_() + top.float())[:kept])
    return _without_targets(states, table, targets, log_totals, grad_states, grad_table)


def _on_gpu(
    states: Tensor, table: Tensor, targets: Tensor, by_states: bool, by_table: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The same by softmax instead of exp: p = e / z is one kernel, and z = e^top / p_top."""
    size = len(table)
    more = -size % GPU_COLUMN_MULTIPLE
    padded = F.pad(table, (0, 0, 0, more)) if more else table
    rows = max(LEAST_ROWS, GPU_CHUNK_BYTES // (states.element_size() * len(padded)))
    buffer = states.new_empty(min(rows, len(states)), len(padded))
    grad_states, grad_table = _empty_gradients(states, padded, by_states, by_table)
    log_totals = []
    for begin in range(0, len(states), rows):
        part = states[begin : begin + rows]
        p = torch.mm(part, padded.T, out=buffer[: len(part)])
        p[:, size:] = float("-inf")
        top, where = p.max(1, keepdim=True)
        torch.softmax(p, 1, out=p)
        log_totals.append(top.float() - p.gather(1, where).float().log())
        if by_states:
            grad_states[begin : begin + rows] = torch.mm(p, padded)
        if by_table:
            _add_product(grad_table, p, part)
    grad_table = None if grad_table is None else grad_table[:size]
    return _without_targets(states, table, targets, log_totals, grad_states, grad_table)


def _empty_gradients(
    states: Tensor, table: Tensor, by_states: bool, by_table: bool
) -> tuple[Tensor | None, Tensor | None]:
    float32 = {"dtype": torch.float32, "device": states.device}
    grad_states = torch.empty(states.shape, **float32) if by_states else None
    return grad_states, torch.zeros(table.shape, **float32) if by_table else None


def _without_targets(
    states: Tensor,
    table: Tensor,
    targets: Tensor,
    log_totals: list[Tensor],
    grad_states: Tensor | None,
    grad_table: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The loss, and the gradients of the log of z less those of the targets' logits, all of them means."""
    count = max(1, len(states))
    own = (states.float() * table[targets].float()).sum(1)
    if grad_states is not None:
        grad_states.sub_(table[targets].float()).div_(count)
    if grad_table is not None:
        grad_table.index_add_(0, targets, states.float(), alpha=-1).div_(count)
    loss = (torch.cat(log_totals).squeeze(1) - own).sum() / count if log_totals else own.sum()
    return loss, grad_states, grad_table


def _add_product(into: Tensor, e: Tensor, scaled: Tensor) -> None:
    """Add eᵀ scaled in float32."""
    if e.dtype == torch.float32:
        into.addmm_(e.T, scaled)
    elif e.is_cuda:
        torch.addmm(into, e.T, scaled, out_dtype=torch.float32, out=into)
    else:
        # The product is bfloat16 and becomes float32 before it is added: in slices that stay in the cache meanwhile.
        for own, columns in zip(into.split(SLICE_ROWS), e.split(SLICE_ROWS, dim=1), strict=True):
            own += torch.mm(columns.T, scaled)


def _row_sums(e: Tensor) -> Tensor:
    """[rows, 1] sums in float32."""
    if e.dtype == torch.float32:
        return e.sum(1, keepdim=True)
    # A float32 sum of bfloat16 copies all of it first. Sums of slices round to bfloat16, each its own way.
    return torch.stack([part.sum(1) for part in e.split(512, dim=1)], 1).sum(1, keepdim=True, dtype=torch.float32)


def _needs_shift(states: Tensor, table: Tensor) -> bool:
    """Whether a logit could be too large for exp."""
    return bool(len(states)) and bool(states.norm(dim=1).amax().float() * table.norm(dim=1).amax().float() > SAFE_LOGIT)


def _autocast(states: Tensor) -> bool:
    return torch.is_autocast_enabled(states.device.type)
