"""The best mixture of texts against a search of the simplex."""

import itertools

import pytest
import torch

from launch.precondition import best_mixture


def value(log_likelihoods: torch.Tensor, shares: tuple[float, ...]) -> float:
    return float((log_likelihoods.exp().double() @ torch.tensor(shares, dtype=torch.double)).log().mean())


@pytest.mark.parametrize("spread", [0.2, 1.0, 4.0])
def test_the_best_mixture_is_the_best_of_a_fine_grid(spread):
    generator = torch.Generator().manual_seed(0)
    log_likelihoods = spread * torch.randn(200, 3, generator=generator) + torch.tensor([0.2, 0.0, -0.1])
    found = best_mixture(log_likelihoods)
    grid = [(a / 40, b / 40, 1 - (a + b) / 40) for a, b in itertools.product(range(41), repeat=2) if a + b <= 40]
    best = max(grid, key=lambda shares: value(log_likelihoods, shares))
    assert found.sum().item() == pytest.approx(1)
    assert found.tolist() == pytest.approx(best, abs=0.03)
    assert value(log_likelihoods, tuple(found.tolist())) >= value(log_likelihoods, best) - 1e-6


def test_what_is_too_sure_of_itself_hedges_and_what_is_not_does_not():
    """One text is better on average, and the same differences matter less and less."""
    generator = torch.Generator().manual_seed(1)
    log_likelihoods = torch.randn(2000, 4, generator=generator) * 3
    log_likelihoods[:, 2] += 1
    shares = [best_mixture(log_likelihoods / temperature)[2].item() for temperature in (1, 3, 9, 27)]
    assert shares == sorted(shares)
    assert shares[0] < 0.6
    assert shares[-1] > 0.99
