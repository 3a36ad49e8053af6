"""Evaluation protocols: everything that makes two published numbers differ, as one object with a hash.

Presets carry the names of the papers. A preset says how to rank, and which split and training part it is meant for;
``of_run`` fills in what a run really had, and the hash of that stands beside its figures.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from rec.data.prepared import Prepared
from rec.runtime.config import Section, hash_of
from rec.runtime.errors import UserError

Split = Literal["leave-one-out", "ratio", "time", "users"]
TrainedOn = Literal["train", "train+valid"]
Part = Literal["valid", "test"]


class Protocol(Section):
    """How held-out items are ranked.

    Metrics have one relevant item: with rank r, HR@k = Recall@k = [r ≤ k], NDCG@k = [r ≤ k] / log2(r + 1),
    MRR@k = [r ≤ k] / r, MRR = 1 / r.
    """

    METRICS_VERSION: ClassVar[int] = 1
    """Of the definitions above; figures under another version have another hash."""

    split: Split | None = None
    """Which split of the data it is meant for, null for any; of a run, the one that its data has."""
    trained_on: TrainedOn | None = None
    """Which part it expects the model to have been trained on, null for any; of a run, what it was trained on."""
    cold_targets: Literal["rank", "drop", "miss"] = "rank"
    """Held-out items that never occur in training: rank them, leave these instances out, or count them as misses."""
    candidates: Literal["all", "sampled"] = "all"
    """Rank the target among all items, or among sampled negatives."""
    negatives: int = Field(100, ge=1)
    negatives_from: Literal["uniform", "popularity"] = "uniform"
    negatives_exclude: Literal["history", "everything"] = "everything"
    """What is never drawn as a negative: the user's history, or all of the user's items. The target never is."""
    negatives_seed: int = Field(98765, ge=0)
    """Negatives are a function of this seed and the data, the same for every model."""
    seen: Literal["rank", "mask"] = "rank"
    """Items of the user's history among the candidates: rank them or leave them out."""
    repeated_targets: Literal["rank", "miss"] = "rank"
    """seen=mask: a target that stands in its own history stays a candidate, or counts as a miss: where a system leaves
    out whatever was seen, it can never name it."""
    ties: Literal["mean", "optimistic", "pessimistic"] = "mean"
    """Equal scores: the target gets the mean, the best or the worst of the places that they share."""
    cutoffs: tuple[PositiveInt, ...] = (10,)
    """The k of HR@k, NDCG@k and MRR@k."""

    def of_run(self, data: Prepared, trained_on: TrainedOn) -> "Protocol":
        """As it is for a model that was trained on this part of ``data``, whatever the protocol is meant for."""
        split = data.meta.get("filters", {}).get("split", "leave-one-out")
        return self.model_copy(update={"split": split, "trained_on": trained_on})

    @property
    def hash(self) -> str:
        """Of everything that decides the figures, and of nothing else; goes into every result line."""
        return hash_of(self._deciding())

    def described(self) -> dict[str, Any]:
        """The hash and what it is of, for a result."""
        return {"hash": self.hash, **self._deciding()}

    def unused(self) -> list[str]:
        """Fields that are set to something else than their defaults, and have no effect beside the others."""
        fields = type(self).model_fields
        return sorted(name for name in self._idle() if getattr(self, name) != fields[name].default)

    def _idle(self) -> set[str]:
        idle = set(ONLY_SAMPLED if self.candidates == "all" else ONLY_ALL)
        return idle | ({"repeated_targets"} if self.seen == "rank" else set())

    def _deciding(self) -> dict[str, Any]:
        """The fields that have an effect beside the others, and the version of the metrics."""
        return {"metrics_version": self.METRICS_VERSION, **self.model_dump(mode="json", exclude=self._idle())}


# Fields that decide something for one kind of candidates alone.
ONLY_SAMPLED = ("negatives", "negatives_from", "negatives_exclude", "negatives_seed")
ONLY_ALL = ("seen", "repeated_targets")


PRESETS: dict[str, Protocol] = {
    # SeRALM runs in RecBole; of sequential models RecBole ranks everything, seen items included.
    "seralm": Protocol(split="leave-one-out", trained_on="train"),
    "recbole": Protocol(split="leave-one-out", trained_on="train", cutoffs=(5, 10, 20)),
    # The Elephant's code counts #(better) + 1, and drops targets that never occur in training.
    "elephant-100": Protocol(
        split="leave-one-out", trained_on="train", cold_targets="drop", candidates="sampled", ties="optimistic"
    ),
    "elephant-full": Protocol(split="leave-one-out", trained_on="train", cold_targets="drop", ties="optimistic"),
    "lmrec-public": Protocol(split="leave-one-out", trained_on="train"),
    "lmrec-inhouse": Protocol(split="users", trained_on="train", candidates="sampled"),
    "unisrec": Protocol(split="leave-one-out", trained_on="train", cutoffs=(10, 50)),
    "gsasrec": Protocol(split="leave-one-out", trained_on="train", seen="mask"),
    # Cold targets are dropped there and then put back as misses (its "loo_correction").
    "esasrec": Protocol(split="leave-one-out", trained_on="train", seen="mask", cold_targets="miss"),
    # HSTU's data trains on everything but the last item, the validation item included.
    "hstu": Protocol(split="leave-one-out", trained_on="train+valid", seen="mask"),
    # The strictest reading: ties lose, cold targets are misses.
    "strict": Protocol(split="leave-one-out", trained_on="train", seen="mask", cold_targets="miss", ties="pessimistic"),
}


def preset(name: str) -> Protocol:
    """The protocol called ``name``; raises UserError that lists them all."""
    if name not in PRESETS:
        raise UserError(f"unknown protocol {name!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[name]
