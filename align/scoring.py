"""p(y|x,s): a recommender reading histories of which some items carry fresh texts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from align.samples import Sample
from rec.item_encoder import KnowledgeConcat
from rec.models.base import SequenceRecommender


@dataclass(frozen=True)
class Inputs:
    """A batch of histories as a recommender reads them.

    Attributes:
        items: [B, L] item numbers, right-padded with 0.
        lengths: [B].
        targets: [B] item numbers of y.
        rows: [F] the history of each text that does not come from the store.
        places: [F] where in it the text's item stands.
        numbers: [F] which of ``texts`` it is.
        texts: [U, ...] the different texts, as the recommender's ``items.encode`` takes them.
    """

    items: Tensor
    lengths: Tensor
    targets: Tensor
    rows: Tensor
    places: Tensor
    numbers: Tensor
    texts: Tensor

    def to(self, device: torch.device) -> "Inputs":
        """The same on ``device``."""
        return Inputs(*(value.to(device) for value in vars(self).values()))


def pad_histories(histories: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """[B, L] item numbers, right-padded with 0, and [B] lengths."""
    items = torch.nn.utils.rnn.pad_sequence([torch.tensor(history) for history in histories], batch_first=True)
    return items, torch.tensor([len(history) for history in histories])


def make_inputs(samples: Sequence[Sample], read: Callable[[Sequence[str]], Tensor]) -> Inputs:
    """Every draw of every sample as a history of its own, [B k] of them, those of a sample together.

    Args:
        samples: at least one.
        read: makes of texts what ``Inputs.texts`` holds (``llm.text_items.reader_of``).
    """
    draws = [(sample, draw) for sample in samples for draw in sample.draws]
    told = [
        (row, place, text)
        for row, (sample, draw) in enumerate(draws)
        for place, text in (
            *zip(sample.places, (text.text for text in draw), strict=True),
            *((other.place, other.text) for other in sample.others),
        )
    ]
    rows, places, texts = zip(*told, strict=True)
    number = {text: nth for nth, text in enumerate(dict.fromkeys(texts))}  # like texts are encoded once
    return Inputs(
        *pad_histories([sample.items for sample, _ in draws]),
        targets=torch.tensor([sample.target for sample, _ in draws]),
        rows=torch.tensor(rows),
        places=torch.tensor(places),
        numbers=torch.tensor([number[text] for text in texts]),
        texts=read(list(number)),
    )


def knowledge_with_fresh(stored: Tensor, inputs: Inputs, vectors: Tensor) -> Tensor:
    """[B, L, K]: the stored vectors [N + 1, K] of every history item, or those of its text, from ``vectors`` [U, K]."""
    return stored[inputs.items].index_put((inputs.rows, inputs.places), F.embedding(inputs.numbers, vectors))


def log_p_y_given_xs(recommender: SequenceRecommender, inputs: Inputs, temperature: float = 1.0) -> Tensor:
    """[B] log p(y|x,s); the recommender's items must read knowledge."""
    assert isinstance(recommender.items, KnowledgeConcat)
    vectors = recommender.items.encode(inputs.texts)
    knowledge = knowledge_with_fresh(recommender.items.knowledge, inputs, vectors)
    return recommender.log_likelihood(inputs.items, inputs.lengths, inputs.targets, knowledge, temperature)
