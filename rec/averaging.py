"""An exponential moving average of weights: a steadier model than any single step's."""

import copy

import torch
from torch import nn

WARM = 10


class WeightAverage:
    """Keeps a copy of a model whose weights follow those of the trained one.

    Early on the decay is smaller, (1 + t) / (10 + t) after t steps, so that the average forgets where training began.

    Attributes:
        model: the copy.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.model = decay, copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, steps: int) -> None:
        """Take in the weights of ``model`` after ``steps`` steps."""
        decay = min(self.decay, (1 + steps) / (WARM + steps))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
