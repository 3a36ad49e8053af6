"""The recipe of ``recalign probe``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from llm.lmrec_job import LMRecEvaluation
from llm.lmrec_job import read as read_content
from rec.runtime.config import Section, build

Feature = Literal["specific", "agnostic", "combine"]


class AgnosticConfig(Section):
    """Histories of the same users in another service."""

    data: str
    """A prepared folder whose user ids are those of the task."""
    item_text: str = "{title}"


class ProbeConfig(Section):
    """The linear heads W_u and W_i, and how they are trained."""

    features: list[Feature] = Field(["specific"], min_length=1)
    """From which histories user vectors come: the task's own, the same users' in another service until then, or both in
    one text, the other service's first (Table 7's Combine)."""
    prefixes: int = Field(8, ge=1)
    """Training pairs of a user, after random prefixes that are drawn once."""
    loss: Literal["bce", "softmax"] = "bce"
    negatives: int = Field(128, ge=1)
    batch_size: int = Field(1024, ge=1)
    """Pairs a step."""
    lr: float = Field(1e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    steps: int = Field(2000, ge=1)
    validate_every: int = Field(20, ge=1)
    patience: int = Field(200, ge=1)
    """Steps without a better validation loss before training stops."""
    seed: int = Field(42, ge=0)

    @model_validator(mode="after")
    def _validates_in_time(self) -> Self:
        if self.patience < min(self.validate_every, self.steps):
            raise ValueError(
                f"patience {self.patience} ends training before the next validation: validate_every is"
                f" {self.validate_every}"
            )
        return self


class ProbeLLM(Section):
    """The ``llm`` section of a recipe of ``recalign probe``."""

    model: str
    """The pretrained decoder: the run folder of a pretraining, or any causal LM."""
    item_text: str = "{title}"
    agnostic: AgnosticConfig | None = None
    probe: ProbeConfig = ProbeConfig()

    @model_validator(mode="after")
    def _knows_the_other_service(self) -> Self:
        if self.agnostic is None and set(self.probe.features) != {"specific"}:
            raise ValueError("probe.features other than specific need agnostic")
        return self


class ProbeJob(Section):
    """A recipe of ``recalign probe``."""

    data: str
    """A prepared folder: the target task, which the decoder was not trained on."""
    run: Path
    rec: LMRecEvaluation = LMRecEvaluation()
    llm: ProbeLLM


def load_job(path: Path, overrides: Sequence[str] = ()) -> ProbeJob:
    """Read a recipe; raises UserError on a missing file, an unknown key or an impossible value."""
    return build(ProbeJob, read_content(path, overrides))
