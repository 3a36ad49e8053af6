"""What a small LM is trained on, as token rows: histories, "item → item → … [EOS]" (LMRec, section 3.1), or knowledge,
a prompt about an item and a text that is known of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm.tokenizer import ARROW
from rec.data.prepared import Prepared

IGNORED = -100
POOL = 16


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        ids: tokens.
        given: how many of them, from the first on, are given and not learnt.
    """

    ids: list[int]
    given: int = 0


class Corpus:
    """Rows, and batches of them.

    Attributes:
        eos: the token that ends a text.
    """

    eos: int

    def rows(self, seed: int, epoch: int) -> list[Row]:
        """All rows of one epoch."""
        raise NotImplementedError

    def batches(self, seed: int, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Input ids [B, T], right-padded with [EOS], and labels [B, T], where padding and what is given are ignored.

        Like lengths are together, but rows are mixed anew each epoch: a batch of neighbours, of one kind of text or of
        one user's time, would pull the weights its own way.
        """
        rows, rng = self.rows(seed, epoch), np.random.default_rng([seed, epoch, 1])
        lengths, mixed, pool = np.array([len(row.ids) for row in rows]), rng.permutation(len(rows)), POOL * batch_size
        batches = []
        for begin in range(0, len(rows), pool):
            own = mixed[begin : begin + pool]
            by_length = own[np.argsort(lengths[own], kind="stable")]
            batches += [by_length[start : start + batch_size] for start in range(0, len(own), batch_size)]
        for index in rng.permutation(len(batches)):
            chosen = [rows[row] for row in batches[index]]
            ids = [torch.tensor(row.ids) for row in chosen]
            labels = [torch.tensor([IGNORED] * row.given + row.ids[row.given :]) for row in chosen]
            pad = torch.nn.utils.rnn.pad_sequence
            yield pad(ids, True, self.eos), pad(labels, True, IGNORED)


class KnowledgeCorpus(Corpus):
    """Every text of every item after the prompt about it; an item without texts has no row.

    Args:
        prompts: [items] token ids of the prompt about each item.
        texts: [items] what is known of each item, any number of texts.
        tokenizer: of prompts and texts.
        context: tokens in a row, at most; a longer text is cut, and has no end then.
    """

    def __init__(
        self, prompts: list[list[int]], texts: list[list[str]], tokenizer: PreTrainedTokenizerBase, context: int
    ) -> None:
        self.eos = tokenizer.eos_token_id
        owners = [item for item, own in enumerate(texts) for _ in own]
        flat = [f" {text}" for own in texts for text in own]
        answers = tokenizer(flat)["input_ids"] if flat else []
        self.all_rows = [
            Row((prompts[item] + answer + [self.eos])[:context], len(prompts[item]))
            for item, answer in zip(owners, answers, strict=True)
        ]

    def rows(self, seed: int, epoch: int) -> list[Row]:
        return self.all_rows


class HistoryCorpus(Corpus):
    """The training part of every user's history, cut at item boundaries into rows of at most ``context`` tokens.

    Only a history's end carries [EOS]: a cut is not an end. Where the cuts fall changes with the epoch, so that
    every item also begins a row now and then, as it begins a prompt.

    Args:
        data: the prepared data.
        texts: one text per item.
        tokenizer: with an arrow token.
        context: tokens in a row, at most.
    """

    def __init__(self, data: Prepared, texts: list[str], tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self.context = context
        self.arrow, self.eos = tokenizer.convert_tokens_to_ids(ARROW), tokenizer.eos_token_id
        longest = context - 1
        self.head = [ids[:longest] for ids in tokenizer(texts)["input_ids"]]
        self.inner = [ids[:longest] for ids in tokenizer([f" {text}" for text in texts])["input_ids"]]
        numbers = (data.sequence - 1).numpy()
        bounds = zip(data.offsets[:-1].tolist(), data.train_ends.tolist(), strict=True)
        # A split by time or by users leaves some users nothing to train on.
        self.histories = [numbers[begin:end] for begin, end in bounds if end > begin]

    def rows(self, seed: int, epoch: int) -> list[Row]:
        """In history order; a row of one token has nothing to predict and is left out."""
        rng = np.random.default_rng([seed, epoch])
        rows = []
        for history in self.histories:
            cut = int(rng.integers(min(len(history), 8))) if epoch else 0
            for part in (history[:cut], history[cut:]):
                rows += self._cut(part)
            rows[-1].append(self.eos)
        return [Row(row) for row in rows if len(row) > 1]

    def _cut(self, history: np.ndarray) -> list[list[int]]:
        rows: list[list[int]] = []
        for item in history.tolist():
            tokens = self.inner[item]
            # One place is kept for the arrow, one for [EOS].
            if rows and len(rows[-1]) + len(tokens) + 2 <= self.context:
                rows[-1] += [self.arrow, *tokens]
            else:
                rows.append(list(self.head[item]))
        return rows
