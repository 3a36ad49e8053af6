"""Scores of batches of users, and the places of their targets in them: the two inner parts of an evaluation."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from rec.data.prepared import Prepared
from rec.models.base import Recommender
from rec.negatives import draw_negatives
from rec.protocol import Part, Protocol
from rec.runtime.errors import Diverged

# Rows of scores that are made at a time on a CPU, and those of them that are then compared at a time: wide enough for
# fast matrix products, and narrow enough for what is compared to stay in the caches.
SCORED_ROWS, COMPARED_ROWS = 256, 32
# The popular items that decide most instances.
POPULAR = 1024


class Scorer:
    """Scores of instances, some at a time, against vectors of all items that are made once.

    Args:
        model: in evaluation mode.
        table: [N, D] its items' vectors; None of a model that has none.
        data: where histories come from.
        part: of the instances.
        reach: leaves out instances that it knows to be out of reach; None scores all.
    """

    def __init__(
        self, model: Recommender, table: Tensor | None, data: Prepared, part: Part, reach: "Reach | None" = None
    ) -> None:
        self.model, self.table, self.data, self.part, self.reach = model, table, data, part, reach
        self.device = next(model.parameters()).device
        # One for all scores: fresh memory costs more than the arithmetic on it.
        in_cache = self.table is not None and self.device.type == "cpu"
        self.buffer = torch.empty(SCORED_ROWS, data.n_items) if in_cache else None

    def __call__(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of the instances ``rows`` [B] with their scores [part, N], which are overwritten by the next part's.

        States are made together, but a part's wide scores stay in a CPU's cache.
        """
        users = self.data.instances(self.part)[0][rows]
        items, lengths = self.data.histories(self.part, rows, self.model.config.max_length)
        if self.table is None:
            inputs = (value.to(self.device) for value in (users, items, lengths))
            yield from self._checked(rows, self.model.score_all(*inputs).float())
            return
        states = self.model.last_states(items.to(self.device), lengths.to(self.device)).float()
        # States may be of a lower precision, but their scores are compared to the last bit.
        exactly = torch.autocast(self.device.type, enabled=False)
        if self.reach is not None:
            with exactly:
                within = self.reach(states, rows).nonzero()[:, 0]
            rows, states = rows[within.cpu()], states[within]
        size = len(rows) if self.buffer is None else SCORED_ROWS
        for some, own in zip(rows.split(max(1, size)), states.split(max(1, size)), strict=True):
            with exactly:
                out = None if self.buffer is None else self.buffer[: len(some)]
                scores = self.model.scores(own, out=out, table=self.table)
            yield from self._checked(some, scores)

    def _checked(self, rows: Tensor, scores: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """A state that has a NaN makes its every score one, an item its whole column."""
        if not len(rows):
            return
        own = scores.gather(1, self.data.targets(self.part)[rows].to(scores.device)[:, None] - 1)
        if bool(~own.isfinite().all() | scores[0].isnan().any()):
            raise Diverged(
                f"the scores of {self.model.architecture} are no numbers: it has diverged; lower the learning rate"
            )
        yield rows, scores


class Reach:
    """Which targets could be among the first k: those that k popular items alone do not already beat.

    Exact: a popular item counts where its score is higher by more than any order of summation could make up for, and
    of a history that may be left out as many items as it has are not counted at all.

    Args:
        table: [N, D] the items' vectors.
        data: of the instances.
        part: of the instances.
        protocols: all of them rank all items.
        counts: [items + 1] training interactions.
    """

    def __init__(
        self, table: Tensor, data: Prepared, part: Part, protocols: Collection[Protocol], counts: Tensor
    ) -> None:
        users, ends = data.instances(part)
        popular = counts[1:].topk(min(POPULAR, data.n_items)).indices
        self.table, self.targets = table, data.targets(part) - 1
        self.popular = table[popular.to(table.device)]
        self.needed = torch.full((len(users),), max(max(protocol.cutoffs) for protocol in protocols))
        if any(protocol.seen == "mask" for protocol in protocols):
            self.needed = self.needed + ends - data.offsets[users]
        # Each of D products and sums errs by half a unit in the last place at most, in each of two scores.
        self.error = table.norm(dim=1).max() * table.shape[1] * 4 * torch.finfo(table.dtype).eps

    def __call__(self, states: Tensor, rows: Tensor) -> Tensor:
        """[B] marks of the instances ``rows`` [B] with states [B, D]."""
        own = (states * self.table[self.targets[rows].to(states.device)]).sum(1)
        sure = (own + states.norm(dim=1) * self.error)[:, None]
        # Not "fewer are better": of a score that is no number nothing is known.
        return ~((states @ self.popular.T > sure).sum(1) >= self.needed[rows].to(states.device))


class Ranker:
    """One protocol over one part of the data.

    Args:
        protocol: how to rank.
        data: of the instances.
        part: of the instances.
        counts: [items + 1] training interactions; targets without any are cold.
    """

    def __init__(self, protocol: Protocol, data: Prepared, part: Part, counts: Tensor) -> None:
        self.protocol, self.data = protocol, data
        self.users, self.ends = data.instances(part)
        self.targets = data.targets(part)
        self.negatives = draw_negatives(protocol, data, part) if protocol.candidates == "sampled" else None
        self.cold = counts[self.targets] == 0
        masks = (protocol.candidates, protocol.seen, protocol.repeated_targets) == ("all", "mask", "miss")
        self.masked = data.repeated(part) if masks else torch.zeros_like(self.cold)
        self.buffer: Tensor | None = None

    def __call__(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Ranks [B] (float64, on the CPU) of the targets of instances ``rows`` [B] in ``scores`` [B, N]."""
        own = scores.gather(1, self.targets[rows].to(scores.device)[:, None] - 1)
        if self.negatives is not None:
            others = scores.gather(1, self.negatives[rows].to(scores.device).long() - 1)
            return (1 + self._lost(others, own)).cpu()
        if self.buffer is None:
            self.buffer = torch.empty_like(scores[:COMPARED_ROWS] if scores.device.type == "cpu" else scores)
        parts = zip(scores.split(len(self.buffer)), own.split(len(self.buffer)), strict=True)
        lost = torch.cat([self._lost(part, target, out=self.buffer[: len(part)]) for part, target in parts])
        lost = lost - self._lost(own, own)
        if self.protocol.seen == "mask":
            history, counts = (value.to(scores.device) for value in self._others_seen(rows))
            lost = lost - self._lost(scores.gather(1, history), own, counts)
        return (1 + lost).cpu()

    def left(self, instances: Tensor) -> Tensor:
        """Those of ``instances`` that count under this protocol."""
        return instances[~self.cold[instances]] if self.protocol.cold_targets == "drop" else instances

    def missed(self, instances: Tensor) -> Tensor:
        """Marks of those that are misses whatever their scores: cold ones, and masked ones, as the protocol says."""
        cold = self.protocol.cold_targets == "miss"
        return self.masked[instances] | (self.cold[instances] & cold)

    def _lost(self, scores: Tensor, own: Tensor, counts: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """[B] places that ``own`` [B, 1] loses to candidates with scores [B, C], of which ``counts`` [B, C] count.

        Marks are made in floats (in ``out``) and added up: on a CPU several times as fast as counting booleans, and
        exact up to 2^24 of them.
        """
        if self.protocol.ties == "mean":  # half a place to one that is as good: (1 + sign of the difference) / 2
            marks = torch.sub(scores, own, out=out).sign_()
        else:
            beats = torch.ge if self.protocol.ties == "pessimistic" else torch.gt
            marks = beats(scores, own, out=torch.empty_like(scores) if out is None else out)
        if counts is not None:
            marks = marks * counts
        total = marks.sum(1).double()
        if self.protocol.ties != "mean":
            return total
        return (total + (scores.shape[1] if counts is None else counts.sum(1))) / 2

    def _others_seen(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """[B, H] columns of the histories' items, and which of them count: each item once, and the target not."""
        history, _ = self.data.windows(self.users[rows], self.ends[rows], len(self.data.sequence))
        history = history.sort(dim=1).values
        counts = (history > 0) & (history != self.targets[rows, None])
        counts[:, 1:] &= history[:, 1:] != history[:, :-1]
        return (history - 1).clamp(min=0), counts
