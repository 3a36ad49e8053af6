"""p(y|x,s) and p(y|x): a recommender reading histories whose last items carry fresh texts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm.text_encoder import TextEncoder
from rec.item_encoder import KnowledgeConcat
from rec.models.base import SequenceRecommender


@dataclass(frozen=True)
class Inputs:
    """A batch of histories as a recommender reads them.

    Attributes:
        items: [B, L] item numbers, right-padded with 0.
        lengths: [B].
        targets: [B] item numbers of y.
        fresh: [B, n, K] vectors of the fresh texts, of the last n items, oldest first.
        fresh_counts: [B] how many of the n there are (a short history has fewer).
    """

    items: Tensor
    lengths: Tensor
    targets: Tensor
    fresh: Tensor
    fresh_counts: Tensor

    def to(self, device: torch.device) -> "Inputs":
        """The same on ``device``."""
        return Inputs(*(value.to(device) for value in vars(self).values()))


def make_inputs(
    histories: Sequence[list[int]],
    targets: Sequence[int],
    texts: Sequence[list[str]],
    encoder: TextEncoder,
) -> Inputs:
    """Pad histories and encode their fresh texts."""
    lengths = torch.tensor([len(items) for items in histories])
    items = torch.zeros(len(histories), int(lengths.max()), dtype=torch.long)
    for row, history in enumerate(histories):
        items[row, : len(history)] = torch.tensor(history)
    counts = torch.tensor([len(own) for own in texts])
    vectors = encoder([text for own in texts for text in own])
    fresh = torch.zeros(len(texts), int(counts.max()), vectors.shape[1])
    fresh[torch.arange(fresh.shape[1]) < counts[:, None]] = vectors
    return Inputs(items, lengths, torch.as_tensor(targets), fresh, counts)


def knowledge_with_fresh(stored: Tensor, inputs: Inputs) -> Tensor:
    """[B, L, K]: the stored vectors [N + 1, K] of every history item, the last ones replaced by the fresh."""
    knowledge = stored[inputs.items]
    rows, nth = torch.where(
        torch.arange(inputs.fresh.shape[1], device=inputs.items.device) < inputs.fresh_counts[:, None]
    )
    places = (inputs.lengths - inputs.fresh_counts)[rows] + nth
    return knowledge.index_put((rows, places), inputs.fresh[rows, nth])


def log_p_y_given_xs(recommender: SequenceRecommender, inputs: Inputs) -> Tensor:
    """[B] log p(y|x,s); the recommender's items must read knowledge."""
    assert isinstance(recommender.items, KnowledgeConcat)
    knowledge = knowledge_with_fresh(recommender.items.knowledge, inputs)
    return recommender.log_likelihood(inputs.items, inputs.lengths, inputs.targets, knowledge)


def log_p_y_given_x(base: SequenceRecommender, inputs: Inputs) -> Tensor:
    """[B] log p(y|x) of the recommender without knowledge."""
    return base.log_likelihood(inputs.items, inputs.lengths, inputs.targets)
