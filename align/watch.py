"""Whether texts say what the item table knows, and what that is worth: the precondition of alignment, at every step.

An LLM can learn to state a fact only if a text that states it gets more reward than the others of the same pair.
"""

import math
from collections.abc import Sequence

import pyarrow as pa
import torch

from align.objective import LARGEST_LOG, log_mean_exp
from align.samples import Sample


class Watch:
    """Figures of the texts of rewarding samples.

    Args:
        columns: text columns of the item table.
        items: that table; row i describes item number i + 1.
    """

    def __init__(self, columns: Sequence[str], items: pa.Table) -> None:
        self.entries = {column: items[column].to_pylist() for column in columns}

    def figures(self, samples: Sequence[Sample]) -> dict[str, float | None]:
        """Of each column, ``said_COLUMN``: the share of texts that are the item's entry; and ``gap_COLUMN``: the mean
        reward p(y|x,s) / mean p(y|x,s) of such texts minus that of the pair's others, over pairs with both, None where
        there is none. Where pairs have one text, there are no others: then the mean of p(y|x,s) / p(y|x) over pairs
        with such a text minus that over the others, which is noisier. Pairs of several fresh items count in the shares
        alone.
        """
        found = {}
        for column, entries in self.entries.items():
            said = [_said(sample, entries) for sample in samples]
            texts = [hit for draws in said for draw in draws for hit in draw]
            single = [
                (sample, [hit for [hit] in draws])
                for sample, draws in zip(samples, said, strict=True)
                if len(sample.places) == 1
            ]
            found[f"said_{column}"] = sum(texts) / len(texts)
            if all(len(hits) == 1 for _, hits in single):
                found[f"gap_{column}"] = _gap_between(single)
            else:
                gaps = [gap for sample, hits in single if (gap := _gap(sample, hits)) is not None]
                found[f"gap_{column}"] = sum(gaps) / len(gaps) if gaps else None
        return found


def _said(sample: Sample, entries: list[str]) -> list[list[bool]]:
    """[k][n] whether the text is the entry of its item."""
    items = [sample.items[place] for place in sample.places]
    return [[text.text == entries[item - 1] for text, item in zip(draw, items, strict=True)] for draw in sample.draws]


def _gap(sample: Sample, said: list[bool]) -> float | None:
    if all(said) or not any(said):
        return None
    log_p, hits = torch.tensor([sample.log_p_y_given_xs]), torch.tensor(said)
    [rewards] = (log_p - log_mean_exp(log_p)).exp()
    return (rewards[hits].mean() - rewards[~hits].mean()).item()


def _gap_between(samples: Sequence[tuple[Sample, list[bool]]]) -> float | None:
    """Between pairs of one text each."""
    rewards: dict[bool, list[float]] = {True: [], False: []}
    for sample, [hit] in samples:
        [log_p] = sample.log_p_y_given_xs
        rewards[hit].append(math.exp(min(log_p - sample.log_p_y_given_x, LARGEST_LOG)))
    if not all(rewards.values()):
        return None
    return sum(rewards[True]) / len(rewards[True]) - sum(rewards[False]) / len(rewards[False])
