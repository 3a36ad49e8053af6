import numpy as np
import torch
from torch.nn import functional as F

from launch.lmrec.analysis import density
from llm.curvature import top_eigenvalues


def test_the_largest_eigenvalues_are_those_of_the_whole_hessian():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    inputs, labels = torch.randn(20, 4).double(), torch.randint(3, (20,))
    parameters = list(model.parameters())

    def loss(flat):
        pieces = flat.split([parameter.numel() for parameter in parameters])
        values = {
            name: piece.view_as(parameter)
            for (name, parameter), piece in zip(model.named_parameters(), pieces, strict=True)
        }
        return F.cross_entropy(torch.func.functional_call(model, values, inputs), labels)

    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    whole = torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, flat))
    expected = whole[whole.abs().argsort(descending=True)][:3]
    torch.set_default_dtype(torch.float64)
    try:
        found = top_eigenvalues(F.cross_entropy(model(inputs), labels), parameters, 3, tolerance=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_density_has_an_area_of_one():
    places = np.linspace(-20, 30, 5000)
    found = density(np.array([0.0, 1.0, 5.0, 5.5]), places)
    assert abs(np.trapezoid(found, places) - 1) < 1e-3
    assert (found >= 0).all()
