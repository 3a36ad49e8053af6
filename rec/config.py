"""The ``rec`` section of a recipe."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from rec.items import IDItems, ItemsConfig
from rec.losses import LossConfig
from rec.models import MODELS, ModelConfig
from rec.models.sasrec import SASRecConfig
from rec.precision import Precision
from rec.protocol import Protocol, TrainedOn
from rec.runtime.config import Section


class TrainConfig(Section):
    """How a recommender is trained."""

    on: TrainedOn = "train"
    """``train+valid`` trains on the validation items too: nothing is left to stop by, so all ``epochs`` run and the
    last weights are the result."""
    lr: float = Field(1e-3, gt=0)
    """Of Adam."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate rises from 0; constant after."""
    batch_size: int = Field(128, ge=1)
    """Sequences a step, over all processes (prefixes, for models that train on prefixes)."""
    windows: Literal["all", "last"] = "all"
    """Of a sequence that is longer than the model reads: train on all of it, cut into windows, or on its last window
    alone, as the original SASRec and most other toolkits do."""
    prefixes_per_user: int | None = Field(None, ge=1)
    """For models that train on prefixes: so many random ones of each user every epoch; null for all."""
    epochs: int = Field(100, ge=1)
    """At most; early stopping usually comes first."""
    patience: int = Field(10, ge=1)
    """Evaluations without a better validation NDCG@10 before training stops; that of the untrained model is left aside
    (and kept, where it is the best)."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between validations."""
    valid_users: int | None = Field(None, ge=1)
    """Validate on so many of the held-out items, drawn once and for all, in training and in the result; null for all.
    The test has always all of them."""
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay a step of an exponential moving average of the weights, which is then what is validated and kept."""
    precision: Precision = "fp32"
    compile: bool = False
    """Through torch.compile: a minute of compiling, then faster steps, most of all on GPU."""
    checkpoint_every: int = Field(5, ge=1)
    """Epochs between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_checkpoint_every: int | None = Field(None, ge=1)
    """The first checkpoint of every so many steps is kept for good; null for none."""
    start: Path | None = None
    """A finished run of the same model and kind of items, whose weights are started from (Elephant, further-train)."""
    tune: Literal["all", "items", "model"] = "all"
    """Train everything, the items' vectors alone, or everything but these."""
    seed: int = Field(42, ge=0)


class EvaluateConfig(Protocol):
    """The protocol of a run's own validation and test, and the batch it is computed in."""

    batch_size: int = Field(512, ge=1)

    @field_validator("cutoffs")
    @classmethod
    def _ten_is_there(cls, cutoffs: tuple[PositiveInt, ...]) -> tuple[PositiveInt, ...]:
        if 10 not in cutoffs:
            raise ValueError("10 must be among the cutoffs, training stops by NDCG@10")
        return cutoffs

    @property
    def protocol(self) -> Protocol:
        """Without the batch size, which decides nothing."""
        return Protocol(**self.model_dump(exclude={"batch_size"}))


# Options that only some kinds of training samples know.
WINDOWED, PREFIXED = ("next-item", "cloze"), ("prefix",)


class RecConfig(Section):
    """The recommender: its model, items, loss, training and evaluation."""

    model: ModelConfig = SASRecConfig()
    items: ItemsConfig = IDItems()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Values to try of the keys of this section, e.g. {train.lr: [1e-3, 3e-3]}: one training for every combination,
    the best by validation NDCG@10 is the result. What decides on that figure cannot vary."""

    @model_validator(mode="after")
    def _options_are_used(self) -> Self:
        """Every option that is set must matter to this model."""
        model, train = MODELS[self.model.name], self.train
        if model.has_own_loss and self.loss != LossConfig():
            raise ValueError(f"{self.model.name} has a loss of its own: leave rec.loss out")
        if unused := self.loss.unused():
            raise ValueError(f"loss.{unused[0]} is no option of {self.loss.name}: leave it out")
        if idle := self.evaluate.unused():
            raise ValueError(f"evaluate.{idle[0]} decides nothing beside the rest of evaluate: leave it out")
        if train.windows == "last" and model.samples not in WINDOWED:
            raise ValueError(f"{self.model.name} is not trained on windows: leave train.windows out")
        if train.prefixes_per_user is not None and model.samples not in PREFIXED:
            raise ValueError(f"{self.model.name} is not trained on prefixes: leave train.prefixes_per_user out")
        if self.grid and train.on != "train":
            raise ValueError(f"a grid chooses by validation, which train.on={train.on} leaves nothing for")
        if empty := [key for key, values in self.grid.items() if not values]:
            raise ValueError(f"grid.{empty[0]} has no values")
        return self
