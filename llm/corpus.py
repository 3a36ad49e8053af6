"""What a small LM is trained on, as token rows: histories, "item → item → … [EOS]" (LMRec, section 3.1), or knowledge,
a prompt about an item and a text that is known of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm.order import Order, dealt, mixed_length_order
from llm.packing import PADDING, Document, Packed, best_fit, pack
from llm.tokenizer import ARROW, token_ids
from rec.data.prepared import Prepared
from rec.runtime.errors import UserError

IGNORED = -100


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        ids: tokens.
        given: how many of them, from the first on, are given and not learnt.
    """

    ids: list[int]
    given: int = 0


@dataclass(frozen=True)
class LanguageBatch:
    """What one language modelling step sees.

    Attributes:
        ids: [B, T] tokens.
        labels: [B, T] the token that stands at each place if it is to be learnt, or ``IGNORED``.
        packed: the documents of packed rows; None where a row is one text, right-padded, whose padding no causal model
            sees.
    """

    ids: Tensor
    labels: Tensor
    packed: Packed | None = None

    @property
    def tokens(self) -> int:
        """How many tokens are learnt."""
        return int((self.labels[:, 1:] != IGNORED).sum())

    def to(self, device: torch.device) -> "LanguageBatch":
        """The same on ``device``."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


class Corpus:
    """Rows, and batches of them.

    Attributes:
        eos: the token that ends a text.
    """

    eos: int

    def rows(self, seed: int, epoch: int) -> list[Row]:
        """All rows of one epoch."""
        raise NotImplementedError


class PaddedBatches:
    """Some epochs over a corpus, a row a text, right-padded with [EOS].

    Args:
        corpus: cuts its rows anew each epoch.
        seed: of cutting and shuffling.
        epochs: how many.
        batch_size: rows a step.

    Attributes:
        steps: of all epochs.
    """

    def __init__(self, corpus: Corpus, seed: int, epochs: int, batch_size: int) -> None:
        self.corpus, self.seed, self.batch_size = corpus, seed, batch_size
        # Rows are cut anew each epoch, so epochs differ a little in length.
        lengths = [-(-len(corpus.rows(seed, epoch)) // batch_size) for epoch in range(epochs)]
        self.ends = np.cumsum(lengths)
        self.steps = int(self.ends[-1])
        self._epoch = lru_cache(maxsize=1)(self._order)

    def parts(self, step: int) -> list[LanguageBatch]:
        """The one batch of ``step``."""
        epoch = int(np.searchsorted(self.ends, step, side="right"))
        rows, batches = self._epoch(epoch)
        chosen = [rows[row] for row in batches[step - (self.ends[epoch - 1] if epoch else 0)]]
        ids = [torch.tensor(row.ids) for row in chosen]
        labels = [torch.tensor([IGNORED] * row.given + row.ids[row.given :]) for row in chosen]
        pad = torch.nn.utils.rnn.pad_sequence
        return [LanguageBatch(pad(ids, True, self.corpus.eos), pad(labels, True, IGNORED))]

    def _order(self, epoch: int) -> tuple[list[Row], list[np.ndarray]]:
        rows = self.corpus.rows(self.seed, epoch)
        lengths = np.array([len(row.ids) for row in rows])
        return rows, mixed_length_order(lengths, self.seed, epoch, self.batch_size)


class PackedBatches:
    """Documents packed into rows of ``context`` tokens, once; every epoch shuffles the rows.

    Args:
        documents: token ids, at most ``context`` each.
        context: tokens in a row.
        eos: of padding.
        rows: a step, over all ranks.
        micro: rows a forward pass, on one rank.
        seed: of packing and shuffling.
        rank: whose share ``parts`` returns.
        world: how many ranks share a step's rows.
    """

    def __init__(
        self, documents: Sequence[list[int]], context: int, eos: int, rows: int, micro: int, seed: int,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        mixed = np.random.default_rng([seed, 3]).permutation(len(documents))
        self.documents = [Document(documents[number]) for number in mixed]
        self.rows = best_fit([len(document) for document in self.documents], context)
        self.context, self.eos, self.micro, self.rank, self.world = context, eos, micro, rank, world
        self.order = Order(len(self.rows), rows, seed)
        lengths = [len(document) for document in self.documents]
        # A document's first token is given.
        self.learnt = np.array([sum(lengths[number] - 1 for number in row) for row in self.rows])
        self.fill = sum(lengths) / (context * len(self.rows))

    def learnt_tokens(self, step: int) -> int:
        """Tokens that step ``step`` learns, over all ranks."""
        return int(self.learnt[self.order.samples(step)].sum())

    def parts(self, step: int) -> list[LanguageBatch]:
        """This rank's share of step ``step``, a batch a forward pass."""
        own = dealt(self.order.samples(step), self.rank, self.world)
        return [self._batch(own[begin : begin + self.micro]) for begin in range(0, len(own), self.micro)]

    def _batch(self, rows: np.ndarray) -> LanguageBatch:
        packed = pack(self.documents, [self.rows[row] for row in rows], self.eos, self.context)
        follows = torch.zeros_like(packed.ids, dtype=torch.bool)
        follows[:, 1:] = packed.documents[:, 1:] == packed.documents[:, :-1]
        follows &= packed.documents != PADDING
        return LanguageBatch(packed.ids, packed.ids.masked_fill(~follows, IGNORED), packed)


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
        answers = token_ids(tokenizer, flat, special=False)
        self.all_rows = [
            Row((prompts[item] + answer + [self.eos])[:context], len(prompts[item]))
            for item, answer in zip(owners, answers, strict=True)
        ]

    def rows(self, seed: int, epoch: int) -> list[Row]:
        return self.all_rows


class ItemTokens:
    """The tokens of every item, at the head of a text and, with a space before it, after an arrow.

    Args:
        tokenizer: its arrow is one token, or as many as it makes of a text's.
        texts: [items] one text each.
        longest: tokens of an item, at most.

    Raises:
        UserError: if the tokenizer has no arrow at all.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: list[str], longest: int) -> None:
        self.arrow, self.eos = _arrow(tokenizer), tokenizer.eos_token_id
        begin = _before_any_text(tokenizer)
        self.head = [(begin + ids)[:longest] for ids in token_ids(tokenizer, texts, special=False)]
        inner = token_ids(tokenizer, [f" {text}" for text in texts], special=False)
        self.inner = [ids[:longest] for ids in inner]
        self.head_lengths, self.inner_lengths = (np.array([len(ids) for ids in own]) for own in (self.head, self.inner))

    def joined(self, items: np.ndarray) -> tuple[list[int], list[int]]:
        """Tokens of a history, items joined by arrows, and how many stand before the end of each item.

        Args:
            items: [n] numbers from 0.
        """
        ids: list[int] = []
        ends = []
        for item in items.tolist():
            ids += [*self.arrow, *self.inner[item]] if ids else self.head[item]
            ends.append(len(ids))
        return ids, ends

    def length(self, items: np.ndarray) -> int:
        """How many tokens ``joined`` makes of ``items`` [n], one at least."""
        return int(self.head_lengths[items[0]] + (self.inner_lengths[items[1:]] + len(self.arrow)).sum())

    def that_fit(self, items: np.ndarray, room: int) -> np.ndarray:
        """The last of ``items`` [n], as many as ``joined`` makes at most ``room`` tokens of; one at least."""
        after = np.cumsum((self.inner_lengths[items] + len(self.arrow))[::-1])[::-1]
        whole = np.append(after[1:], 0) + self.head_lengths[items]
        begin = int(np.argmax(whole <= room)) if (whole <= room).any() else len(items) - 1
        return items[begin:]


def _before_any_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: a [BOS], or nothing."""
    [whole], [text] = (token_ids(tokenizer, ["a"], special=special) for special in (True, False))
    return next(whole[:at] for at in range(len(whole)) if whole[at : at + len(text)] == text)


def _arrow(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    known = tokenizer.convert_tokens_to_ids(ARROW)
    if known is not None and known != tokenizer.unk_token_id:
        return [known]
    [ids] = token_ids(tokenizer, [f" {ARROW}"], special=False)
    if not ids or {tokenizer.eos_token_id, tokenizer.unk_token_id}.intersection(ids):
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} cannot write {ARROW!r}, which joins items")
    return ids


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
        self.tokens = ItemTokens(tokenizer, texts, context - 1)
        self.eos = self.tokens.eos
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
            tokens = self.tokens.inner[item]
            # Places are kept for the arrow and for [EOS].
            if rows and len(rows[-1]) + len(self.tokens.arrow) + len(tokens) + 1 <= self.context:
                rows[-1] += [*self.tokens.arrow, *tokens]
            else:
                rows.append(list(self.tokens.head[item]))
        return rows
