"""What alignment needs before it can work, measured in a closed world under the not-aligned recommender.

For every rewarding pair the last item of the history reads, in turn, the sentence about each attribute: how much more
reward does the driving one get? And what would be best for Eq. 5, if the LLM could choose nothing but how often it
speaks of which attribute: only the driving one, or a mixture?
"""

import math
from typing import Any

import torch
from torch import Tensor

from align.config import MainJob, Stages
from align.order import PairOrder, set_aside
from llm.text_encoder import TextEncoder
from llm.text_items import vectors_by
from rec.build import MODEL
from rec.data.prepared import Prepared
from rec.data.readers.closed_world import ATTRIBUTES
from rec.models.base import SequenceRecommender

PRECONDITION = "precondition"
ROWS, ROUNDS, RATE = 512, 4000, 0.2


def precondition(job: MainJob, data: Prepared) -> dict[str, Any]:
    """Figures of the pairs that reward.

    Returns:
        ``pairs``; ``temperature`` of the likelihoods; ``reward`` of each attribute, p(y|x,s) over its mean over the
        four; ``gap`` of the driving one to the mean of the others, with ``gap_se``; ``signal_to_noise``, its mean
        surplus over its standard deviation, 0 where no text makes a difference; ``log_likelihood`` of each;
        ``best_share``, how often Eq. 5 would have the driving attribute spoken of, by temperature.
    """
    stages, align = Stages(job.run), job.align
    driving = list(ATTRIBUTES).index(data.meta["options"]["driving"])
    _, folder = stages.aligning(align)
    model = SequenceRecommender.from_pretrained(folder / MODEL)
    encode = vectors_by(model.items, TextEncoder(stages.encoder_model(job.llm), job.llm.encoder))
    vectors = torch.stack([encode(data.items[attribute].to_pylist()) for attribute in ATTRIBUTES], dim=1)
    aside = set_aside(data, align.reward_users, align.trainer.seed)
    rewarding = data.without(~aside) if align.reward_users else data
    ends = torch.from_numpy(PairOrder(rewarding, model.reach, 0).targets)
    temperature = stages.temperatures(align)[1]
    by_temperature = {value: _log_likelihoods(model, data, ends, vectors, value) for value in {1.0, temperature}}
    found = by_temperature[temperature]
    relative = (found - found.logsumexp(1, keepdim=True) + math.log(found.shape[1])).exp()
    gaps = relative[:, driving] - (relative.sum(1) - relative[:, driving]) / (relative.shape[1] - 1)
    surplus, deviation = float((relative[:, driving] - 1).mean()), float(relative[:, driving].std())
    return {
        "pairs": len(ends),
        "temperature": temperature,
        "reward": dict(zip(ATTRIBUTES, relative.mean(0).tolist(), strict=True)),
        "gap": float(gaps.mean()),
        "gap_se": float(gaps.std() / math.sqrt(len(gaps))),
        "signal_to_noise": surplus / deviation if deviation else 0.0,
        "log_likelihood": dict(zip(ATTRIBUTES, found.mean(0).tolist(), strict=True)),
        "best_share": {str(value): float(best_mixture(own)[driving]) for value, own in sorted(by_temperature.items())},
    }


def is_closed_world(data: Prepared) -> bool:
    """Whether it is known of ``data`` which attribute drives what users do."""
    return "driving" in data.meta.get("options", {})


def best_mixture(log_likelihoods: Tensor) -> Tensor:
    """[k] the shares π that maximise Σ log Σ_k π_k p(y|x,s_k), Eq. 5 for a policy that is the same for all items.

    Args:
        log_likelihoods: [M, k] log p(y|x,s_k).
    """
    likelihoods = (log_likelihoods - log_likelihoods.max(1, keepdim=True).values).double().exp()
    shares = torch.full((likelihoods.shape[1],), 1 / likelihoods.shape[1], dtype=torch.double)
    for _ in range(ROUNDS):
        # Exponentiated gradient, which stays on the simplex; the objective is concave.
        gradient = (likelihoods / (likelihoods @ shares)[:, None]).mean(0)
        shares = shares * (RATE * (gradient - 1)).exp()
        shares = shares / shares.sum()
    return shares


@torch.no_grad()
def _log_likelihoods(
    model: SequenceRecommender, data: Prepared, ends: Tensor, vectors: Tensor, temperature: float
) -> Tensor:
    """[M, k] log p(y|x,s_k) with the k-th of the ``vectors`` [N, k, K] as the text of the last item."""
    users = torch.searchsorted(data.offsets, ends, right=True) - 1
    found = []
    for some in torch.arange(len(ends)).split(ROWS):
        items, lengths = data.windows(users[some], ends[some], model.config.max_length)
        rows, last = torch.arange(len(some)), lengths - 1
        own = []
        for texts in vectors.unbind(1):
            knowledge = model.items.knowledge[items]
            knowledge[rows, last] = texts[items[rows, last] - 1]
            own.append(model.log_likelihood(items, lengths, data.sequence[ends[some]], knowledge, temperature))
        found.append(torch.stack(own, dim=1))
    return torch.cat(found)
