"""How sure a recommender may be: one temperature for its scores, by the likelihood of what it was not trained on.

Training goes on for the best ranking, and long before that a recommender is surer of itself than it has reason to be:
its likelihood of held-out items can fall below that of a guess. Temperature scaling (Guo et al. 2017) leaves every
ranking as it is and makes the likelihood mean something.
"""

import torch

from rec.data.prepared import Prepared
from rec.models.base import SequenceRecommender

# 0.25 to 32 in steps of 19 %.
TEMPERATURES = [2 ** (step / 4) for step in range(-8, 21)]
ROWS = 512


@torch.no_grad()
def fit_temperature(model: SequenceRecommender, data: Prepared) -> float:
    """Of ``TEMPERATURES``, the one under which the validation items are likeliest; 1 where there are none."""
    instances = len(data.instances("valid")[0])
    if not instances:
        return 1.0
    device = next(model.parameters()).device
    totals = torch.zeros(len(TEMPERATURES), dtype=torch.double)
    for begin in range(0, instances, ROWS):
        rows = torch.arange(begin, min(begin + ROWS, instances))
        items, lengths = data.histories("valid", rows, model.config.max_length)
        scores = model.score_all(rows, items.to(device), lengths.to(device)).float()
        targets = (data.targets("valid")[rows] - 1).to(device)[:, None]
        for place, temperature in enumerate(TEMPERATURES):
            scaled = scores / temperature
            totals[place] += (scaled.gather(-1, targets).squeeze(-1) - scaled.logsumexp(-1)).sum().double().cpu()
    return TEMPERATURES[int(totals.argmax())]
