"""The recipe of ``recalign pretrain``: LMRec."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch.nn import ModuleDict

from llm.config import LMRecConfig
from rec.config import EvaluateConfig
from rec.precision import Precision
from rec.runtime.config import Section, apply_overrides, build, hash_of, read_recipe, without
from rec.runtime.errors import UserError
from rec.runtime.runfolder import run_override

TARGET = "target"
Beta = Annotated[float, Field(ge=0, lt=1)]
# Table 9, the columns that are not sizes.
TABLE_9 = {
    "1.7M": {"recommendation_weight": 1e-2, "pairs": 256, "lr": 5e-3, "weight_decay": 1e-2},
    "7M": {"recommendation_weight": 1e-2, "pairs": 512, "lr": 2e-3, "weight_decay": 1e-2},
    "20M": {"recommendation_weight": 8e-3, "pairs": 1024, "lr": 1e-3, "weight_decay": 5e-2},
    "64M": {"recommendation_weight": 8e-3, "pairs": 1024, "lr": 8e-4, "weight_decay": 1e-1},
    "125M": {"recommendation_weight": 3e-3, "pairs": 1024, "lr": 2e-4, "weight_decay": 1e-1},
    "210M": {"recommendation_weight": 3e-3, "pairs": 1024, "lr": 2e-4, "weight_decay": 1e-1},
}


class SourceConfig(Section):
    """One source of task-agnostic text; exactly one of ``data``, ``items`` and ``text``."""

    data: str | None = None
    """A prepared folder, whose training histories are read."""
    items: Path | None = None
    """A csv or parquet table of items (.gz too), every item a text of its own."""
    text: Path | None = None
    """Plain text, a file or a folder of them (.txt, .txt.gz), every paragraph a text of its own."""
    item_text: str = "{title}"
    """Template of an item's text, for ``data`` and ``items``."""
    share: float | None = Field(None, gt=0)
    """How much of it is read, in multiples of the tokens of the whole task-specific corpus (Table 5); null for all."""

    @model_validator(mode="after")
    def _is_one_source(self) -> Self:
        if sum(value is not None for value in (self.data, self.items, self.text)) != 1:
            raise ValueError("a source has exactly one of data, items and text")
        return self


class CorpusConfig(Section):
    """What is language modelled."""

    specific: float = Field(1.0, ge=0, le=1)
    """Share of the tasks' own training histories that is read."""
    agnostic: list[SourceConfig] = Field(default_factory=list)
    """Task-agnostic sources (LMRec +agnostic)."""


class TaskConfig(Section):
    """A further recommendation task that is trained at the same time (Eq. 7)."""

    data: str
    """A prepared folder."""
    item_text: str = "{title}"


class RecommendConfig(Section):
    """L2: pairs of users and items."""

    loss: Literal["bce", "softmax"] = "bce"
    """Eq. 5, or the softmax over the positive and the negatives."""
    pairs: int = Field(512, ge=1)
    """Positive pairs a step and task, over all ranks: Table 9's batch size. As near as a multiple of pairs / prefixes
    histories comes to it on average, where many are shorter than ``prefixes``."""
    prefixes: int = Field(8, ge=1)
    """Pairs that one history gives a step, each after a random prefix of it; all are read in one pass."""
    negatives: int = Field(128, ge=1)
    """Random items a step, shared by its pairs."""
    exclude: Literal["target", "taken"] = "target"
    """Which of them a pair leaves out: its own target, or all that its user took. At test these are ranked too, and a
    model that never saw them as negatives puts them first."""
    in_batch: bool = False
    """With loss=softmax: whether the targets of a forward pass are negatives of its other pairs too, for nothing; the
    logits are then corrected by the log of the probability that an item is there (log Q)."""
    recommendation_weight: float = Field(1e-2, gt=0)
    """λ of Eq. 6 at the first step."""
    reduction: Literal["sum", "mean"] = "mean"
    """Over a step's pairs. The paper gives L2 for one pair and not how pairs are put together; as the weight of a sum,
    Table 9's λ lets L2 outweigh L1, and a small decoder never learns more of the language than how often each token
    is there (docs/experiments.md)."""
    standardise: bool = True
    """Whether W_u and W_i read [EOS] states that are standardised, without which small decoders trained from scratch
    collapse; false is Eq. 4 as printed."""
    heads_lr_factor: float = Field(1.0, gt=0)
    """Learning rate of W_u and W_i, in multiples of the decoder's."""
    micro_histories: int = Field(64, ge=1)
    """Histories a forward pass, on one rank."""

    @model_validator(mode="after")
    def _in_batch_is_a_softmax(self) -> Self:
        if self.in_batch and self.loss != "softmax":
            raise ValueError("in_batch goes with loss=softmax: Eq. 5's negatives are random")
        if self.standardise and self.micro_histories == 1:
            raise ValueError("micro_histories=1 leaves nothing to standardise over: take more, or standardise=false")
        return self

    def terms(self, pairs: int) -> int:
        """What the mean of L2 over a step's ``pairs`` is multiplied by; short histories give fewer than asked for."""
        return pairs if self.reduction == "sum" else 1


class LMRecTrainConfig(Section):
    """How LMRec is trained (appendix A)."""

    processes: int = Field(1, ge=1)
    """Ranks, over all machines."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """Of DeepSpeed; 0 is one process without it."""
    precision: Precision | Literal["fp16"] = "auto"
    """fp16: DeepSpeed's, with dynamic loss scaling."""
    activation_checkpointing: bool = False
    """Compute a layer's activations again in the backward pass instead of keeping them."""
    compile: bool = False
    """Through torch.compile."""
    cross_entropy: Literal["chunked", "liger"] = "chunked"
    """Kernel of the LM's loss: plain torch, or Liger's (NVIDIA GPUs, pip install liger-kernel)."""

    steps: int = Field(2000, ge=1)
    rows: int = Field(64, ge=1)
    """Packed rows of ``llm.lmrec.context`` tokens a language modelling step, over all ranks."""
    micro_rows: int = Field(8, ge=1)
    """Rows a forward pass, on one rank; more are accumulated."""
    lr: float = Field(2e-3, gt=0)
    weight_decay: float = Field(1e-2, ge=0)
    """Of matrices alone."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(1e-6, gt=0)
    warmup_fraction: float = Field(0.01, ge=0, le=1)
    warmup_steps: int = Field(100, ge=0)
    """At least so many steps of warm-up, but a tenth of ``steps`` at most: the paper's one percent is of runs so long
    that these are hundreds, and with a handful small decoders collapse before they learn."""
    final_fraction: float = Field(0.1, ge=0, le=1)
    """What learning rate and λ decay to, as a share of their highest value."""
    clip_norm: float = Field(0.1, gt=0)

    validate_every: int = Field(20, ge=1)
    """Steps between validations of the recommendation loss."""
    validation_users: int = Field(1024, ge=1)
    """Validation pairs that it is computed on, at most, the same every time."""
    patience: int = Field(100, ge=1)
    """Steps without a better one before training stops."""
    patience_from: int = Field(0, ge=0)
    """Steps before which they are not counted: from scratch, a decoder may spend its first hundreds on a plateau."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_checkpoint_every: int | None = Field(None, ge=1)
    """The first checkpoint of every so many steps is kept for good; null for none."""
    seed: int = Field(42, ge=0)

    @property
    def warmup(self) -> float:
        """Share of the steps that the warm-up takes."""
        return max(self.warmup_fraction, min(self.warmup_steps, self.steps // 10) / self.steps)

    @model_validator(mode="after")
    def _ranks_share_evenly(self) -> Self:
        if self.rows % self.processes:
            raise ValueError(f"rows {self.rows} is not divisible by processes {self.processes}")
        if self.zero_stage == 0 and self.processes > 1:
            raise ValueError(f"zero_stage=0 is one process, processes is {self.processes}")
        if self.zero_stage == 0 and self.precision == "fp16":
            raise ValueError("precision=fp16 needs DeepSpeed's loss scaling: set zero_stage to 1, 2 or 3")
        if self.patience < min(self.validate_every, self.steps):
            raise ValueError(
                f"patience {self.patience} ends training before the next validation: validate_every is"
                f" {self.validate_every}"
            )
        return self


class LMRecLLM(Section):
    """The ``llm`` section of such a recipe."""

    item_text: str = "{title}"
    """Template of an item's text; names in braces are columns of the prepared ``items.parquet``."""
    model: str | None = None
    """Weights and tokenizer to start from: a folder, or the run folder of another pretraining (SelfPretrain); null
    trains from scratch."""
    lmrec: LMRecConfig = LMRecConfig()
    language: bool = True
    """L1; without it this is LMRec -lm."""
    corpus: CorpusConfig = CorpusConfig()
    recommend: RecommendConfig | None = RecommendConfig()
    """L2; null trains a language model alone."""
    tasks: dict[str, TaskConfig] = Field(default_factory=dict)
    """Recommendation tasks beside the one on the recipe's ``data``."""
    train: LMRecTrainConfig = LMRecTrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _table_9_fills_in(cls, given: Any) -> Any:
        """The hyperparameters of the preset, where the recipe does not give them."""
        preset = (
            given["lmrec"].get("preset") if isinstance(given, dict) and isinstance(given.get("lmrec"), dict) else None
        )
        row = TABLE_9.get(str(preset).removesuffix("-printed"))
        if row is None:
            return given
        filled = dict(given)
        for section, keys in (("recommend", ("recommendation_weight", "pairs")), ("train", ("lr", "weight_decay"))):
            own = given.get(section, {})
            if isinstance(own, dict):
                filled[section] = {key: row[key] for key in keys} | own
        return filled

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.language and self.recommend is None:
            raise ValueError("language=false and recommend=null leave nothing to train")
        if not self.language and self.corpus != CorpusConfig():
            raise ValueError("corpus is for language modelling, which language=false leaves out")
        if self.recommend is None and self.tasks:
            raise ValueError("tasks are recommendation tasks, which recommend=null leaves out")
        if TARGET in self.tasks or any(not name.isidentifier() for name in self.tasks):
            raise ValueError(f"names of tasks are letters, digits and underscores, and not {TARGET!r}")
        if taken := [name for name in self.tasks if name == "loss" or hasattr(ModuleDict(), name)]:
            raise ValueError(f"a task cannot be called {taken[0]!r}, which means something else here")
        if self.recommend is not None:
            if self.recommend.prefixes >= self.lmrec.context:
                raise ValueError(
                    f"recommend.prefixes {self.recommend.prefixes} leave no room in lmrec.context {self.lmrec.context}"
                )
            histories, ranks = self.recommend.pairs // self.recommend.prefixes, self.train.processes
            if self.recommend.pairs % self.recommend.prefixes or histories % ranks:
                raise ValueError(
                    f"recommend.pairs {self.recommend.pairs} is not divisible by recommend.prefixes"
                    f" {self.recommend.prefixes} x train.processes {ranks}"
                )
        return self


class LMRecEvaluation(Section):
    """The ``rec`` section of such a recipe."""

    evaluate: EvaluateConfig = EvaluateConfig(batch_size=128)
    """Protocol of the test figures; full ranking by default."""


class LMRecJob(Section):
    """A recipe of LMRec."""

    placement: ClassVar[tuple[str, ...]] = ("llm.train.processes",)

    data: str
    """A prepared folder, or the name of a built-in data set: the task that is evaluated."""
    run: Path
    """The run folder."""
    rec: LMRecEvaluation = LMRecEvaluation()
    llm: LMRecLLM = LMRecLLM()

    @property
    def identity(self) -> str:
        """Hash of everything that decides the result, but for the number of ranks: a run may go on with another."""
        return hash_of(without(self.model_dump(mode="json"), ("run", *self.placement)))


def read(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A pretraining recipe's content; the ``config.yaml`` of a run folder means that folder, wherever it lies now."""
    return apply_overrides(read_recipe(path), [*run_override(path), *overrides])


def is_recformer(content: dict[str, Any]) -> bool:
    """Whether a recipe means RECFORMER, not LMRec."""
    llm = content.get("llm")
    return isinstance(llm, dict) and llm.get("recformer") is not None


def load_job(path: Path, overrides: Sequence[str] = ()) -> LMRecJob:
    """Read a recipe of LMRec.

    Raises:
        UserError: on a missing file, an unknown key or an impossible value, or if it is RECFORMER's.
    """
    content = read(path, overrides)
    if is_recformer(content):
        raise UserError(f"{path} is a recipe of RECFORMER (it has llm.recformer), not of LMRec")
    return build(LMRecJob, content)
