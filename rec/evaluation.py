"""Ranking the held-out items: HR@k, NDCG@k, MRR, with standard errors, under any number of protocols in one pass.

Scores of one batch of users exist at a time, never [users, items], and every protocol reads the same scores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rec.batches import fit_counts
from rec.config import EvaluateConfig
from rec.data.prepared import Prepared
from rec.models.base import Recommender, SequenceRecommender
from rec.negatives import require_negatives
from rec.protocol import Part, Protocol, TrainedOn
from rec.ranking import Ranker, Reach, Scorer
from rec.runtime import files
from rec.runtime.errors import UserError


@dataclass(frozen=True)
class Metrics:
    """Figures of one evaluation.

    Attributes:
        ranks: [M] the (possibly fractional) rank of each held-out item, best is 1; infinite for a counted miss.
        cutoffs: the k of HR@k, NDCG@k and MRR@k.
        instances: [M] which of the data's instances these are.
        users: [M] whose they are.
        complete: whether ranks beyond the cutoffs are known too; otherwise they are infinite, and there is no MRR.
    """

    ranks: Tensor
    cutoffs: tuple[int, ...]
    instances: Tensor
    users: Tensor
    complete: bool = True

    def of(self, rows: Tensor) -> "Metrics":
        """Those of some ``rows``: numbers, or [M] marks."""
        return replace(self, ranks=self.ranks[rows], instances=self.instances[rows], users=self.users[rows])

    def values(self) -> dict[str, Tensor]:
        """[M] values of each metric, one an instance."""
        values = {}
        for k in self.cutoffs:
            hit = (self.ranks <= k).double()
            values[f"HR@{k}"] = hit
            values[f"NDCG@{k}"] = hit / torch.log2(1 + self.ranks)
            values[f"MRR@{k}"] = hit / self.ranks
        if self.complete:
            values["MRR"] = 1 / self.ranks
        return values

    def summary(self) -> dict[str, float | None]:
        """Means over instances and their standard errors (``NAME`` and ``NAME_se``; None of a single user).

        A user's instances are no independent draws, users are: with one instance a user this is the plain standard
        error, with several the cluster-robust one.
        """
        owners = self.users.unique(return_inverse=True)[1]
        count = int(owners.max()) + 1 if len(owners) else 0
        result: dict[str, float | None] = {}
        for name, value in self.values().items():
            result[name] = float(value.mean())
            residuals = torch.zeros(count, dtype=torch.double).index_add_(0, owners, value - value.mean())
            spread = residuals.square().sum() * count / max(1, count - 1)
            result[f"{name}_se"] = float(spread.sqrt() / len(value)) if count > 1 else None
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
    complete: bool = True,
) -> Metrics:
    """``evaluate_many`` under the one protocol of ``config``."""
    protocols = {"": config.protocol}
    return evaluate_many(model, data, part, protocols, config.batch_size, instances, trained_on, complete)[""]


@torch.no_grad()
def evaluate_many(
    model: Recommender,
    data: Prepared,
    part: Part,
    protocols: Mapping[str, Protocol],
    batch_size: int = 512,
    instances: Sequence[int] | Tensor | None = None,
    trained_on: TrainedOn = "train",
    complete: bool = True,
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
        complete: find ranks beyond the cutoffs too. Without them the figures at the cutoffs are the same, and most
            targets are only compared with the popular items, which beat them.

    Raises:
        UserError: if there is nothing to rank, or the model has diverged to scores that are no numbers.
    """
    users, ends = data.instances(part)
    chosen = torch.arange(len(ends)) if instances is None else torch.as_tensor(instances)
    if not len(chosen):
        raise UserError(f"{data.folder} has no {part} items to rank")
    counts, was_training = fit_counts(data, trained_on), model.training
    for protocol in protocols.values():
        _require_warm(protocol, data, part, counts, chosen)
    model.eval()
    rankers = {name: Ranker(protocol, data, part, counts) for name, protocol in protocols.items()}
    ranks = {name: torch.full((len(ends),), torch.inf, dtype=torch.double) for name in protocols}
    # Once for all batches: an item encoder may have to compute it.
    table = model.items.table()[1:].float() if isinstance(model, SequenceRecommender) else None
    reach, asked = None, protocols.values()
    if not complete and table is not None and all(protocol.candidates == "all" for protocol in asked):
        reach = Reach(table, data, part, asked, counts)
    scorer = Scorer(model, table, data, part, reach)
    # Neighbours in length share a batch: little padding.
    order = (ends - data.offsets[users])[chosen].argsort(stable=True)
    for rows in chosen[order].split(batch_size):
        for some, scores in scorer(rows):
            for name, ranker in rankers.items():
                ranks[name][some] = ranker(scores, some)
    model.train(was_training)
    return {name: _metrics(ranker, ranks[name], chosen, complete) for name, ranker in rankers.items()}


def _metrics(ranker: Ranker, ranks: Tensor, instances: Tensor, complete: bool) -> Metrics:
    """Of the ``ranks`` of all of the part's instances those that were asked for and count."""
    instances = ranker.left(instances)
    ranks = ranks[instances].masked_fill(ranker.missed(instances), torch.inf)
    cutoffs = ranker.protocol.cutoffs
    if not complete:  # what is known beyond the cutoffs depends on what was popular
        ranks = ranks.masked_fill(ranks > max(cutoffs), torch.inf)
    return Metrics(ranks, cutoffs, instances, ranker.users[instances], complete)


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


def require_cutoffs(protocol: Protocol, data: Prepared, whose: str) -> None:
    """Raise a UserError if the protocol (called ``whose``) asks for longer lists than the data has items."""
    if max(protocol.cutoffs) > data.n_items:
        raise UserError(
            f"{whose} asks for the best {max(protocol.cutoffs)} of {data.n_items} items; use smaller cutoffs (10"
            " at least in training, which stops by NDCG@10)"
        )


def _require_warm(protocol: Protocol, data: Prepared, part: Part, counts: Tensor, instances: Tensor) -> None:
    """Raise a UserError if the protocol drops every target of ``instances``: ``counts`` has none of them."""
    targets = data.targets(part)[instances]
    if protocol.cold_targets == "drop" and len(targets) and not counts[targets].any():
        raise UserError(
            f"all {len(targets)} {part} items of {data.folder} are cold, they never occur in training: nothing is left"
            " to rank unless they are ranked too (cold_targets=rank)"
        )


def require_possible(
    config: EvaluateConfig, data: Prepared, trained_on: TrainedOn = "train", parts: Sequence[Part] = ("test",)
) -> None:
    """Raise a UserError for what would end the evaluation of a run, before it has trained anything."""
    require_cutoffs(config, data, "rec.evaluate.cutoffs")
    own = config.protocol.of_run(data, trained_on)
    for name in ("split", "trained_on"):
        if getattr(config, name) not in (None, getattr(own, name)):
            raise UserError(f"rec.evaluate.{name} is {getattr(config, name)}, that of this run is {getattr(own, name)}")
    counts = fit_counts(data, trained_on)
    for part in parts:
        require_negatives(config, data, part)
        _require_warm(config, data, part, counts, torch.arange(len(data.targets(part))))
