"""Ranking the held-out items: HR@k, NDCG@k, MRR, with standard errors, under any number of protocols in one pass.

Scores of one batch of users exist at a time, never [users, items], and every protocol reads the same scores.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rec.batches import fit_counts
from rec.config import EvaluateConfig
from rec.data.prepared import Prepared
from rec.models.base import Recommender, SequenceRecommender
from rec.negatives import draw_negatives
from rec.protocol import Protocol, TrainedOn
from rec.runtime import files
from rec.runtime.errors import Diverged, UserError

Part = Literal["valid", "test"]
# Rows of scores that are made at a time on a CPU, and those of them that are then compared at a time: wide enough for
# fast matrix products, and narrow enough for what is compared to stay in the caches.
SCORED_ROWS, COMPARED_ROWS = 256, 32


@dataclass(frozen=True)
class Metrics:
    """Figures of one evaluation.

    Attributes:
        ranks: [M] the (possibly fractional) rank of each held-out item, best is 1; infinite for a counted miss.
        cutoffs: the k of HR@k, NDCG@k and MRR@k.
        instances: [M] which of the data's instances these are.
        users: [M] whose they are.
    """

    ranks: Tensor
    cutoffs: tuple[int, ...]
    instances: Tensor
    users: Tensor

    def values(self) -> dict[str, Tensor]:
        """[M] values of each metric, one an instance."""
        values = {}
        for k in self.cutoffs:
            hit = (self.ranks <= k).double()
            values[f"HR@{k}"] = hit
            values[f"NDCG@{k}"] = hit / torch.log2(1 + self.ranks)
            values[f"MRR@{k}"] = hit / self.ranks
        values["MRR"] = 1 / self.ranks
        return values

    def summary(self) -> dict[str, float]:
        """Means over instances and their standard errors (``NAME`` and ``NAME_se``).

        A user's instances are no independent draws, users are: with one instance a user this is the plain standard
        error, with several the cluster-robust one.
        """
        owners = self.users.unique(return_inverse=True)[1]
        count = int(owners.max()) + 1 if len(owners) else 0
        result = {}
        for name, value in self.values().items():
            result[name] = float(value.mean())
            residuals = torch.zeros(count, dtype=torch.double).index_add_(0, owners, value - value.mean())
            spread = residuals.square().sum() * count / max(1, count - 1)
            result[f"{name}_se"] = float(spread.sqrt() / max(1, len(value)))
        return result

    def __getitem__(self, name: str) -> float:
        return float(self.values()[name].mean())


def evaluate(
    model: Recommender,
    data: Prepared,
    part: Part,
    config: EvaluateConfig,
    instances: Sequence[int] | Tensor | None = None,
    trained_on: TrainedOn = "train",
) -> Metrics:
    """``evaluate_many`` under the one protocol of ``config``."""
    return evaluate_many(model, data, part, {"": config}, config.batch_size, instances, trained_on)[""]


@torch.no_grad()
def evaluate_many(
    model: Recommender,
    data: Prepared,
    part: Part,
    protocols: Mapping[str, Protocol],
    batch_size: int = 512,
    instances: Sequence[int] | Tensor | None = None,
    trained_on: TrainedOn = "train",
) -> dict[str, Metrics]:
    """Rank every held-out item of ``part`` under every protocol.

    Args:
        model: put into evaluation mode for the time.
        data: where histories and targets come from; the test history includes the validation item.
        part: the validation or the test items.
        protocols: by the names that the result has.
        batch_size: instances whose scores exist at a time.
        instances: which of the data's held-out items, by number; all by default.
        trained_on: what the model was trained on; targets that never occur there are cold.

    Raises:
        UserError: if there is nothing to rank, or the model has diverged to scores that are no numbers.
    """
    users, ends = data.instances(part)
    chosen = torch.arange(len(ends)) if instances is None else torch.as_tensor(instances)
    if not len(chosen):
        raise UserError(f"{data.folder} has no {part} items to rank")
    rankers = {name: _Ranker(protocol, data, part, trained_on) for name, protocol in protocols.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in protocols}
    targets = data.targets(part)
    scorer, was_training = _Scorer(model, data.n_items), model.training
    model.eval()
    # Neighbours in length share a batch: little padding. Every result goes back to its place.
    order = (ends - data.offsets[users])[chosen].argsort(stable=True)
    for rows in chosen[order].split(batch_size):
        items, lengths = data.histories(part, rows, model.config.max_length)
        for some, scores in scorer(rows, users[rows], items, lengths):
            if _not_numbers(scores, targets[some]):
                raise Diverged(
                    f"the scores of {model.architecture} are no numbers: it has diverged; lower the learning rate"
                )
            for name, ranker in rankers.items():
                found[name].append(ranker(scores, some))
    model.train(was_training)
    back = order.argsort()
    return {name: rankers[name].metrics(torch.cat(found[name])[back], chosen) for name in protocols}


def some_instances(data: Prepared, part: Part, count: int | None) -> Tensor:
    """Numbers of ``count`` held-out instances, the same in every run and for every model; of all, if that is null."""
    total = len(data.instances(part)[0])
    if count is None or count >= total:
        return torch.arange(total)
    return torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count].sort().values


def save_ranks(metrics: Metrics, path: Path) -> None:
    """Keep what ``load_ranks`` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = files.beside(path)
    save_file({name: getattr(metrics, name) for name in ("ranks", "instances", "users")}, temporary)
    temporary.replace(path)


def load_ranks(path: Path, cutoffs: tuple[int, ...]) -> Metrics:
    """What ``save_ranks`` kept, so that models can be compared user by user later."""
    kept = load_file(path)
    return Metrics(kept["ranks"], cutoffs, kept["instances"], kept["users"])


class _Scorer:
    """Scores of batches, part by part: states are made together, but a part's wide scores stay in a CPU's cache."""

    def __init__(self, model: Recommender, n_items: int) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.in_parts = isinstance(model, SequenceRecommender) and self.device.type == "cpu"
        # One for all parts: fresh memory costs more than the arithmetic on it.
        self.buffer = torch.empty(SCORED_ROWS, n_items) if self.in_parts else None

    def __call__(self, rows: Tensor, users: Tensor, items: Tensor, lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Parts of ``rows`` [B] with their scores [part, N], which are overwritten by the next part's."""
        inputs = users.to(self.device), items.to(self.device), lengths.to(self.device)
        if not self.in_parts:
            yield rows, self.model.score_all(*inputs).float()
            return
        states = self.model.last_states(*inputs[1:]).float()
        for part, own in zip(rows.split(SCORED_ROWS), states.split(SCORED_ROWS), strict=True):
            yield part, self.model.scores(own, out=self.buffer[: len(part)])


def _not_numbers(scores: Tensor, targets: Tensor) -> bool:
    """Whether scores [B, N] have a NaN: of a state that has one, every score is NaN; of an item, its whole column."""
    own = scores.gather(1, targets.to(scores.device)[:, None] - 1)
    return bool(own.isnan().any() | scores[0].isnan().any())


class _Ranker:
    """One protocol over one part of the data."""

    def __init__(self, protocol: Protocol, data: Prepared, part: Part, trained_on: TrainedOn) -> None:
        self.protocol, self.data = protocol, data
        self.users, self.ends = data.instances(part)
        self.targets = data.targets(part)
        self.negatives = draw_negatives(protocol, data, part) if protocol.candidates == "sampled" else None
        self.cold = fit_counts(data, trained_on)[self.targets] == 0
        self.marks: Tensor | None = None

    def __call__(self, scores: Tensor, rows: Tensor) -> Tensor:
        """Ranks [B] (float64, on the CPU) of the targets of instances ``rows`` [B] in ``scores`` [B, N]."""
        own = scores.gather(1, self.targets[rows].to(scores.device)[:, None] - 1)
        if self.negatives is not None:
            others = scores.gather(1, self.negatives[rows].to(scores.device).long() - 1)
            better, equal = (others > own).sum(1), (others == own).sum(1)
        else:
            if self.marks is None:
                self.marks = torch.empty_like(scores[:COMPARED_ROWS] if scores.device.type == "cpu" else scores)
            better, equal = _count(scores, own, self.marks)
            if self.protocol.seen == "mask":
                seen_better, seen_equal = self._count_seen(scores, own, rows)
                better, equal = better - seen_better, equal - seen_equal
        share = {"mean": 0.5, "optimistic": 0.0, "pessimistic": 1.0}[self.protocol.ties]
        return (1 + better.double() + share * equal.double()).cpu()

    def metrics(self, ranks: Tensor, instances: Tensor) -> Metrics:
        """Cold targets treated as the protocol says."""
        cold = self.cold[instances]
        if self.protocol.cold_targets == "miss":
            ranks = ranks.masked_fill(cold, float("inf"))
        elif self.protocol.cold_targets == "drop":
            ranks, instances = ranks[~cold], instances[~cold]
        return Metrics(ranks, self.protocol.cutoffs, instances, self.users[instances])

    def _count_seen(self, scores: Tensor, own: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """How many of the history's items, each once and the target not, are better and equal."""
        history, _ = self.data.windows(self.users[rows], self.ends[rows], len(self.data.sequence))
        history = history.sort(dim=1).values
        counts = (history > 0) & (history != self.targets[rows, None])
        counts[:, 1:] &= history[:, 1:] != history[:, :-1]
        history, counts = history.to(scores.device), counts.to(scores.device)
        seen = scores.gather(1, (history - 1).clamp(min=0))
        return ((seen > own) & counts).sum(1), ((seen == own) & counts).sum(1)


def _count(scores: Tensor, own: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    """[B] numbers of scores [B, N] above ``own`` [B, 1], and of others equal to it; ``marks`` [rows, N] is overwritten.

    Comparing into floats and adding those up is ten times as fast on CPU as counting booleans, and exact up to 2^24.
    """
    better, as_good = [], []
    for part, target in zip(scores.split(len(marks)), own.split(len(marks)), strict=True):
        own_marks = marks[: len(part)]
        better.append(torch.gt(part, target, out=own_marks).sum(1))
        as_good.append(torch.ge(part, target, out=own_marks).sum(1))
    return torch.cat(better), torch.cat(as_good) - torch.cat(better) - 1
