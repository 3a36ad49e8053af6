"""The ``rec`` section of a recipe."""

from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from rec.models.sasrec import SASRecConfig
from rec.runtime.config import Section


class TrainConfig(Section):
    """How a recommender is trained."""

    lr: float = Field(1e-3, gt=0)
    batch_size: int = Field(128, ge=1)
    """Sequences a step."""
    epochs: int = Field(100, ge=1)
    """At most; early stopping usually comes first."""
    patience: int = Field(10, ge=1)
    """Evaluations without a better validation NDCG@10 before training stops."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between validations."""
    weight_decay: float = Field(0.0, ge=0)
    checkpoint_every: int = Field(5, ge=1)
    """Epochs between checkpoints."""
    seed: int = 42


class EvaluateConfig(Section):
    """What is ranked, and how ties count."""

    seen: Literal["rank", "mask"] = "rank"
    """Items of the user's history among the candidates: rank them (the three papers) or leave them out."""
    cutoffs: tuple[PositiveInt, ...] = (10,)
    """The k of HR@k and NDCG@k; 10 must be among them, training stops by NDCG@10."""
    batch_size: int = Field(512, ge=1)

    @field_validator("cutoffs")
    @classmethod
    def _ten_is_there(cls, cutoffs: tuple[int, ...]) -> tuple[int, ...]:
        if 10 not in cutoffs:
            raise ValueError("10 must be among the cutoffs")
        return cutoffs


class RecConfig(Section):
    """The recommender: its model, training and evaluation."""

    model: Literal["SASRec"] = "SASRec"
    sasrec: SASRecConfig = SASRecConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
