"""Whether texts say what the item table knows, and what that is worth: the precondition of alignment, at every step.

An LLM can learn to state a fact only if a text that states it gets more reward than the others of the same pair.
"""

from collections.abc import Sequence

import pyarrow as pa
import torch

from align.objective import log_mean_exp
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
        there is none. Pairs of several fresh items count in the shares alone.
        """
        found = {}
        for column, entries in self.entries.items():
            said = [_said(sample, entries) for sample in samples]
            texts = [hit for draws in said for draw in draws for hit in draw]
            gaps = [
                gap
                for sample, draws in zip(samples, said, strict=True)
                if len(sample.places) == 1 and (gap := _gap(sample, [hit for [hit] in draws])) is not None
            ]
            found[f"said_{column}"] = sum(texts) / len(texts)
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
