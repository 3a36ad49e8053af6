"""One recommendation task as pairs of a history and its next item: what L2 is computed on (LMRec, section 2.1)."""

from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from llm.corpus import ItemTokens
from llm.joint import PairBatch
from llm.lmrec_job import RecommendConfig
from llm.order import Order, dealt
from llm.packing import Document, Packed, best_fit, pack, places_of_branches
from rec.data.prepared import Prepared
from rec.runtime.errors import UserError

ITEM_ROW, HISTORY_ROW = 128, 512
"""Tokens of a row, unless a text is longer: in rows of a long context most of the attention would be between texts that
do not see each other."""
LENGTH_MULTIPLE = 32
"""Rows are as long as their texts, rounded up: oneDNN keeps kernels of every shape that it has met."""
SAMPLE = 1024
WINDOWS = 32  # places at which a history that is too long is looked at
"""Histories by which it is estimated how many pairs one gives."""
VALIDATION, VALIDATION_NEGATIVES, VALIDATION_HISTORIES = 2**31 - 1, 512, 64
"""A validation's seed, its random items, and the histories of a pass: as many whatever the recipe trains with."""


class TextRows:
    """Histories and items of one data set as packed rows with [EOS] vectors.

    Args:
        tokens: of the items.
        context: positions of the model, one of which is [EOS]'s.
    """

    def __init__(self, tokens: ItemTokens, context: int) -> None:
        self.tokens, self.context = tokens, context

    def items(self, numbers: np.ndarray) -> tuple[Packed, Tensor]:
        """The texts of items ``numbers`` [I] (from 0), and the places [I] of their [EOS]."""
        found = [self.tokens.head[number] for number in numbers.tolist()]
        return self._rows([Document(ids, (len(ids),)) for ids in found], ITEM_ROW)

    def histories(self, histories: list[np.ndarray]) -> tuple[Packed, Tensor]:
        """The latest items of each history that the model reads, and the places [B] of [EOS] after them."""
        ids = [self.tokens.joined(self.tokens.that_fit(own, self.context - 1))[0] for own in histories]
        return self._rows([Document(own, (len(own),)) for own in ids], HISTORY_ROW)

    def prefixes(self, windows: list[np.ndarray], cuts: list[np.ndarray]) -> tuple[Packed, Tensor]:
        """Histories, and the places of [EOS] after the first ``cuts`` items of each, history by history."""
        documents = []
        for items, own in zip(windows, cuts, strict=True):
            ids, ends = self.tokens.joined(items[: own[-1]])
            documents.append(Document(ids, [ends[cut - 1] for cut in own]))
        return self._rows(documents, HISTORY_ROW)

    def fits(self, items: np.ndarray, cuts: np.ndarray) -> bool:
        """Whether the model reads all of ``items``, with [EOS] after ``cuts`` of its beginnings."""
        return self.tokens.length(items) + len(cuts) <= self.context

    def _rows(self, documents: list[Document], length: int) -> tuple[Packed, Tensor]:
        lengths = [len(document) for document in documents]
        rows = best_fit(lengths, max(min(length, self.context), *lengths))
        longest = max(sum(lengths[number] for number in row) for row in rows)
        padded = min(longest + -longest % LENGTH_MULTIPLE, max(longest, self.context))
        packed = pack(documents, rows, self.tokens.eos, padded)
        return packed, places_of_branches(documents, rows, packed.ids.shape[1])


class RecommendationTask:
    """The pairs of one task, a batch a step.

    Args:
        name: of the task.
        number: of the task, so that tasks draw differently.
        data: its prepared folder.
        tokens: of its items.
        config: sizes of batches.
        context: positions of the model.
        seed: of everything that is drawn.
        rank: whose share ``parts`` returns.
        world: how many ranks share a step's histories.

    Raises:
        UserError: if no user has two training interactions.
    """

    def __init__(
        self, name: str, number: int, data: Prepared, tokens: ItemTokens, config: RecommendConfig, context: int,
        seed: int, rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.name, self.number, self.data, self.config, self.seed = name, number, data, config, seed
        self.rows, self.rank, self.world = TextRows(tokens, context), rank, world
        self.items = (data.sequence - 1).numpy()
        # Items of one text have one vector: none of them is a negative where another is the target.
        first: dict[tuple[int, ...], int] = {}
        self.text_of = np.array([first.setdefault(tuple(ids), number) for number, ids in enumerate(tokens.head)])
        begins, ends = data.offsets[:-1].numpy(), data.train_ends.numpy()
        users = np.flatnonzero(ends - begins >= 2)
        if not len(users):
            raise UserError(f"{data.folder}: no user has two training interactions, so there are no pairs to train on")
        self.spans = np.stack([begins[users], ends[users]], 1)
        self.order = Order(len(users), self._histories(), seed + number)

    def parts(self, step: int) -> tuple[list[PairBatch], int]:
        """This rank's share of step ``step``, a batch a forward pass, and the step's pairs over all ranks.

        Which prefixes and negatives there are is decided for the whole step by its own random generator.
        """
        rng = np.random.default_rng([self.seed, self.number, step])
        chosen = self.order.samples(step)
        spans, cuts = zip(*(self._window(history, rng) for history in chosen.tolist()), strict=True)
        negatives = self._negatives(rng, self.config.negatives)
        mine, size = dealt(np.arange(len(chosen)), self.rank, self.world), self.config.micro_histories
        parts = [
            self._batch([spans[nth] for nth in own], [cuts[nth] for nth in own], negatives)
            for own in (mine[begin : begin + size] for begin in range(0, len(mine), size))
        ]
        return parts, sum(map(len, cuts))

    def validation(self, most: int) -> list[tuple[PairBatch, float]]:
        """This rank's batches of the validation pairs, ``most`` at most, each with its share of all of them.

        Every rank has equally many batches, some with a share of 0: ranks compute together.
        """
        users, ends = self.data.instances("valid")
        rng = np.random.default_rng([self.seed, self.number, VALIDATION])
        chosen = np.sort(rng.permutation(len(ends))[:most])
        if not len(chosen):
            raise UserError(f"{self.data.folder} has no validation items to stop by")
        negatives, size = self._negatives(rng, VALIDATION_NEGATIVES), VALIDATION_HISTORIES
        groups = [chosen[begin : begin + size] for begin in range(0, len(chosen), size)]
        shares = [len(group) / len(chosen) for group in groups]
        short = -len(groups) % self.world
        groups, shares = groups + [groups[0]] * short, shares + [0.0] * short
        found = []
        for group, share in list(zip(groups, shares, strict=True))[self.rank :: self.world]:
            own = [(int(self.data.offsets[users[row]]), int(ends[row])) for row in group]
            histories, places = self.rows.histories([self.items[begin:end] for begin, end in own])
            targets = [self.items[end : end + 1] for _, end in own]
            found.append((self._pairs(histories, places, targets, negatives), share))
        return found

    def _histories(self) -> int:
        """A step's: a multiple of ``pairs / prefixes``, so that ranks share them evenly, that gives about ``pairs``."""
        rng, prefixes = np.random.default_rng([self.seed, self.number]), self.config.prefixes
        some = range(0, len(self.spans), -(-len(self.spans) // SAMPLE))
        given = np.mean([len(self._window(history, rng)[1]) for history in some])
        return self.config.pairs // prefixes * max(1, round(prefixes / given))

    @cached_property
    def shares(self) -> np.ndarray:
        """[N] how often each item is a step's target, as a share of all of them: histories are drawn alike, and each
        gives ``prefixes`` of its targets at most. Windows of histories that are too long end at some places for all."""
        found = np.zeros(self.data.n_items)
        for begin, end in self.spans.tolist():
            ends = (
                [end] if self._fits(begin, end) == end - 1 - begin else np.linspace(begin + 2, end, WINDOWS).astype(int)
            )
            for last in ends:
                targets = self.items[last - self._fits(begin, last) : last]
                np.add.at(found, targets, min(self.config.prefixes, len(targets)) / len(targets) / len(ends))
        return found / found.sum()

    def _fits(self, begin: int, end: int) -> int:
        """How many items before the last of ``begin`` to ``end`` the model can read."""
        room = self.rows.context - self.config.prefixes
        return len(self.rows.tokens.that_fit(self.items[begin : end - 1], room))

    def _window(self, history: int, rng: np.random.Generator) -> tuple[tuple[int, int], np.ndarray]:
        """A stretch of a training history that the model can read, and after how many of its items pairs are taken."""
        begin, end = self.spans[history].tolist()
        fits = self._fits(begin, end)
        if fits < end - 1 - begin:  # too long: its inputs end at a random place
            end = int(rng.integers(begin + 2, end + 1))
            fits = self._fits(begin, end)
            begin = end - 1 - fits
        cuts = rng.permutation(np.arange(1, fits + 1))[: self.config.prefixes]
        return (begin, end), np.sort(cuts)

    def _batch(self, spans: list[tuple[int, int]], cuts: list[np.ndarray], negatives: np.ndarray) -> PairBatch:
        windows = [self.items[begin:end] for begin, end in spans]
        histories, places = self.rows.prefixes(windows, cuts)
        targets = [items[own] for items, own in zip(windows, cuts, strict=True)]
        return self._pairs(histories, places, targets, negatives, [self._known(begin) for begin, _ in spans])

    def _known(self, place: int) -> np.ndarray:
        """All training items of the user who has the interaction at ``place``."""
        begin, end = self.spans[np.searchsorted(self.spans[:, 0], place, side="right") - 1]
        return self.items[begin:end]

    def _pairs(
        self,
        histories: Packed,
        places: Tensor,
        targets_of: list[np.ndarray],
        negatives: np.ndarray,
        known: list[np.ndarray] | None = None,
    ) -> PairBatch:
        """Pairs of histories with ``targets_of`` each. In training, ``known`` is what their users took: then the recipe
        says which negatives there are, otherwise they are all but a pair's own target, as at test."""
        targets, presence = np.concatenate(targets_of), None
        numbers = np.unique(np.concatenate([targets, negatives]))
        items, vectors = self.rows.items(numbers)
        if known and self.config.in_batch:
            absent = (1 - self.shares[numbers]) ** len(targets) * (1 - len(negatives) / self.data.n_items)
            negatives, presence = numbers, torch.from_numpy(np.log1p(-absent)).float()
        allowed = self.text_of[negatives] != self.text_of[targets][:, None]
        if known and self.config.exclude == "taken":
            free = np.stack([~np.isin(negatives, own) for own in known])
            allowed &= free.repeat([len(own) for own in targets_of], axis=0)
        positives, others = (torch.from_numpy(np.searchsorted(numbers, own)) for own in (targets, negatives))
        presence = torch.zeros(len(numbers)) if presence is None else presence
        return PairBatch(
            self.name, histories, places, items, vectors, positives, others, torch.from_numpy(allowed), presence
        )

    def _negatives(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.choice(self.data.n_items, size=min(count, self.data.n_items), replace=False)
