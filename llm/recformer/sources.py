"""What stage-PT is trained on: the training parts of one or several catalogs' histories, each with a next item."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from llm.recformer.batches import SequenceMaker
from llm.recformer.config import RecformerPretrainConfig
from llm.recformer.mlm import mask_tokens
from llm.recformer.objective import PretrainBatch
from rec.data.prepared import Prepared
from rec.runtime.errors import UserError
from rec.runtime.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """Histories and the items after them.

    Attributes:
        histories: item numbers of each, newest last.
        next_items: [P].
    """

    histories: list[np.ndarray]
    next_items: np.ndarray

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, rows: np.ndarray) -> "Pairs":
        """The pairs ``rows``."""
        return Pairs([self.histories[row] for row in rows.tolist()], self.next_items[rows])


class Sources:
    """Users of several prepared folders; their items are numbered one folder after the other.

    Never more than the training part of a user is trained on: a source may be the target of an evaluation too.

    Args:
        folders: the prepared data.
        stage: how many users, and the seed that draws them.

    Raises:
        UserError: if no two users have two training interactions, or there are more ranks than users.
    """

    def __init__(self, folders: Sequence[Prepared], stage: RecformerPretrainConfig) -> None:
        self.stage = stage
        self.sequences: list[np.ndarray] = []
        valid_histories: list[np.ndarray] = []
        valid_items: list[int] = []
        first = 0
        for data in folders:
            sequence = data.sequence.numpy() + first
            bounds = zip(data.offsets[:-1].tolist(), data.train_ends.tolist(), strict=True)
            self.sequences += [sequence[begin:end] for begin, end in bounds if end - begin >= 2]
            users, ends = data.instances("valid")
            begins = data.offsets[users].tolist()
            kept = [(begin, end) for begin, end in zip(begins, ends.tolist(), strict=True) if end > begin]
            valid_histories += [sequence[begin:end] for begin, end in kept]
            valid_items += [int(sequence[end]) for _, end in kept]
            first += data.n_items
        if len(self.sequences) < 2:
            raise UserError(
                "llm.recformer.pretrain.sources leave nothing to train on: no two users with two items each"
            )
        rng = np.random.default_rng(stage.seed)
        order = rng.permutation(len(self.sequences))[: stage.users]
        self.users = order[: max(2, round(stage.share * len(order)))]
        if len(self.users) < (size := Ranks.current().size):
            raise UserError(f"stage-PT has {len(self.users)} users for {size} processes: take fewer processes")
        chosen = rng.permutation(len(valid_histories))[: stage.valid_users]
        self.valid = Pairs(valid_histories, np.array(valid_items, dtype=np.int64)).take(chosen)

    def batch_size(self) -> int:
        """Of a global batch: the recipe's, or as many users as there are, the same number on every rank."""
        size = Ranks.current().size
        return max(size, min(self.stage.batch_size, len(self.users) // size * size))

    def steps(self) -> int:
        """Steps of one epoch; users who are left over sit this epoch out."""
        return len(self.users) // self.batch_size()

    def pairs(self, epoch: int, step: int) -> Pairs:
        """The global batch of one step: every user's target is drawn from the second half of the history."""
        order = np.random.default_rng([self.stage.seed, 1, epoch]).permutation(self.users)
        size = self.batch_size()
        chosen = order[step * size : (step + 1) * size]
        own = [self.sequences[user] for user in chosen]
        draws = np.random.default_rng([self.stage.seed, 2, epoch, step]).random(len(own))
        targets = [_target(len(sequence), draw) for sequence, draw in zip(own, draws, strict=True)]
        histories = [sequence[:target] for sequence, target in zip(own, targets, strict=True)]
        return Pairs(histories, np.array([sequence[target] for sequence, target in zip(own, targets, strict=True)]))


def _target(length: int, draw: float) -> int:
    """A place from the second half, uniform; never the first, which has no history."""
    first = max(1, (length - 1) // 2)
    return first + int(draw * (length - first))


class BatchMaker:
    """Makes this rank's share of a global batch; how tokens are masked does not depend on the ranks.

    Args:
        maker: of token sequences.
        stage: how tokens are masked.
        mask_token: id of [MASK].
        vocabulary: tokens that there are.
    """

    def __init__(self, maker: SequenceMaker, stage: RecformerPretrainConfig, mask_token: int, vocabulary: int) -> None:
        self.maker, self.stage, self.mask_token, self.vocabulary = maker, stage, mask_token, vocabulary

    def __call__(self, pairs: Pairs, seed: Sequence[int]) -> PretrainBatch:
        """The rows ``rank::size`` of the histories, and of the next items."""
        count = len(pairs)
        sequences = self.maker([*pairs.histories, *(np.array([item]) for item in pairs.next_items)])
        rng, stage = np.random.default_rng(list(seed)), self.stage
        masked = mask_tokens(sequences, stage.mask_ratio, stage.whole_words, self.mask_token, self.vocabulary, rng)
        owners = np.repeat(np.arange(2 * count), masked.lengths)
        labels = masked.labels >= 0
        ranks = Ranks.current()
        own = np.arange(ranks.rank, count, ranks.size)
        rows = np.concatenate([own, count + own])
        return PretrainBatch(
            sequences.take(rows),
            masked.take(rows),
            torch.from_numpy(pairs.next_items[own]),
            (int(labels[owners < count].sum()), int(labels[owners >= count].sum())),
        )


def batches_of(pairs: Pairs, size: int) -> Iterator[Pairs]:
    """Consecutive batches of ``size`` pairs; what is left over is left out, unless it is all there is."""
    ranks = Ranks.current().size
    size = min(size, len(pairs) // ranks * ranks)
    for begin in range(0, len(pairs) - size + 1, max(1, size)):
        if size >= 2:
            yield pairs.take(np.arange(begin, begin + size))
