"""The largest Hessian eigenvalues of the recommendation loss (LMRec, appendix C and Fig. 5).

Subspace iteration on Hessian-vector products, each two passes of autograd: a few lines of plain torch, as the libraries
for it are no longer kept up.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from llm.joint import JointModel, PairBatch

ITERATIONS = 100
TOLERANCE = 1e-3


def top_eigenvalues(
    loss: Tensor, parameters: Sequence[nn.Parameter], count: int, tolerance: float = TOLERANCE, seed: int = 0
) -> Tensor:
    """[count] eigenvalues of the Hessian that are largest in magnitude, largest first.

    Args:
        loss: a scalar that can be differentiated twice.
        parameters: by which.
        count: how many.
        tolerance: the largest step of an iteration, as a share of the largest eigenvalue, at which they count as found;
            a hundred iterations are the end of it.
        seed: of the vectors that it begins with.
    """
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    generator = torch.Generator().manual_seed(seed)
    size = sum(parameter.numel() for parameter in parameters)
    basis = torch.linalg.qr(torch.randn(size, count, generator=generator).to(loss.device)).Q
    values = torch.zeros(count, device=basis.device)
    for _ in range(ITERATIONS):
        product = torch.stack([_product(gradients, parameters, column) for column in basis.T], 1)
        before, values = values, torch.linalg.eigvalsh((basis.T @ product + product.T @ basis) / 2)
        basis = torch.linalg.qr(product).Q
        if (values - before).abs().max() <= tolerance * values.abs().max():
            break
    return values[values.abs().argsort(descending=True)].cpu()


def _product(gradients: Sequence[Tensor], parameters: Sequence[nn.Parameter], vector: Tensor) -> Tensor:
    """[size] H v."""
    pieces = vector.split([parameter.numel() for parameter in parameters])
    inner = sum((gradient.flatten() * piece).sum() for gradient, piece in zip(gradients, pieces, strict=True))
    found = torch.autograd.grad(inner, parameters, retain_graph=True)
    return torch.cat([part.flatten() for part in found])


def curvature(model: JointModel, batch: PairBatch, count: int = 5) -> Tensor:
    """[count] of a batch's L2 by the decoder's weights, in float32."""
    model.bf16 = False
    parameters = [parameter for parameter in model.decoder.parameters() if parameter.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        return top_eigenvalues(model(batch), parameters, count)
