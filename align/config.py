"""The ``align`` section of a recipe, and the whole recipe of the main job."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from align.objective import Baseline, Denominator
from llm.config import LLMConfig
from rec.config import RecConfig, TrainConfig
from rec.data.builtin import BUILTIN
from rec.items import IDItems
from rec.runtime import files
from rec.runtime.config import Section, hash_of, load, without
from rec.runtime.errors import UserError
from rec.runtime.runfolder import run_override

TEMPERATURE = "temperature.json"


class ObjectiveConfig(Section):
    """Eq. 6 to 8 of SeRALM."""

    alpha: float = Field(0.1, ge=0)
    """Coefficient α of the KL penalty to the frozen original."""
    baseline: Baseline = "none"
    """Subtracted from the weight p(y|x,s)/p(y|x): nothing (Eq. 6), its expectation 1 (Eq. 10), or the mean over the
    pair's other texts (with k of 1, over the other pairs of the batch). None of them changes the expected gradient, the
    last one changes its variance most."""
    temperature: Annotated[float, Field(gt=0)] | Literal["calibrated"] = 1.0
    """Of the recommenders' p(y|x,s) and p(y|x) where they reward: 1 (the paper), or what makes the validation items
    likeliest. One that is too sure of itself makes the best of Eq. 5 a mixture of texts: it hedges."""
    max_ratio: float | None = Field(None, gt=0)
    """Clip p(y|x,s)/p(y|x) at this value; null for the paper's unclipped ratio."""
    scale_rewards: bool = False
    """Divide the weights of a step by their root mean square, so that α means the same however sharp the recommender is
    or flat a temperature made it. Needs a baseline: without one the weights are near 1 whatever the texts."""
    samples: int = Field(1, ge=1)
    """k of Eq. 6: texts that are drawn for each fresh item of a pair (x, y), and compared on that pair."""
    denominator: Denominator = "base"
    """p(y|x): of the frozen recommender without knowledge (the paper), or the mean of p(y|x,s) over the k texts."""
    kl: Literal["sampled", "exact"] = "sampled"
    """The penalty from the sampled tokens alone (the paper), or exact over the vocabulary at each of their places."""
    max_importance: float | None = Field(None, ge=1)
    """Correct for samples of an older policy by p_now(s|x)/p_then(s|x), truncated here; null for none (the paper)."""

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Self:
        if self.scale_rewards and self.baseline == "none":
            raise ValueError("scale_rewards needs a baseline: without one the weights are near 1 whatever the texts")
        if self.denominator == "group" and self.samples < 2:
            raise ValueError("denominator=group needs samples of 2 at least: one text alone has the ratio 1")
        return self


class LoRAConfig(Section):
    """Low-rank adapters (peft) instead of all weights; the original is the same model with the adapters off."""

    rank: int = Field(16, ge=1, le=512)
    alpha: int = Field(32, ge=1)
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """All linear layers but the output head, or those whose names end so."""


class TrainerConfig(Section):
    """The trainer job: DeepSpeed for the LLM, DDP for the recommender."""

    processes: int = Field(2, ge=1)
    """Ranks of the whole trainer, over all machines."""
    zero_stage: Literal[1, 2, 3] = 2
    offload: bool = False
    """With ZeRO-3: weights, gradients and optimizer states of the LLM in host memory while they are not in use."""
    bf16: bool = False
    batch_size: int = Field(32, ge=2)
    """Samples (x, y) a step, over all ranks."""
    steps: int = Field(300, ge=1)
    lr: float = Field(1e-4, gt=0)
    """Of the LLM (AdamW, constant after warm-up)."""
    lora: LoRAConfig | None = None
    """Adapters instead of all weights; for architectures whose adapters vLLM reads, GPT-2's are not among them."""
    warmup_steps: int = Field(10, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    rec_lr: float = Field(1e-4, gt=0)
    """Of the recommender (Adam)."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_checkpoint_every: int | None = Field(None, ge=1)
    """The first checkpoint of every so many steps is kept for good; null for none."""
    keep_snapshots: int | None = Field(None, ge=2)
    """Newest snapshots that are kept; null for as many as generators may be loading."""
    seed: int = 42

    @model_validator(mode="after")
    def _offloads_what_is_sharded(self) -> Self:
        if self.offload and self.zero_stage != 3:
            raise ValueError("offload needs zero_stage=3: the other stages keep all weights on every device")
        return self


class GeneratorConfig(Section):
    """The generator job: vLLM and the recommender snapshot."""

    processes: int = Field(1, ge=1)
    """Generators, each with a vLLM of its own, that take turns: ``batches_per_call`` steps each."""
    batches_per_call: int = Field(4, ge=1)
    """Trainer batches that one vLLM call generates, where the staleness bound allows."""
    cpu_cores: int | None = Field(None, ge=1)
    """On a machine without GPUs: so many cores for the generator alone, the others for the trainer; null lets both use
    all of them."""


class AlignConfig(Section):
    """Asynchronous alignment training."""

    objective: ObjectiveConfig = ObjectiveConfig()
    trainer: TrainerConfig = TrainerConfig()
    generator: GeneratorConfig = GeneratorConfig()
    refresh_every: int = Field(50, ge=1)
    """Trainer steps between snapshots (SeRALM: 50)."""
    max_lag_steps: int = Field(100, ge=0)
    """Hard bound: step t never trains on a sample whose weights are older than step t - max_lag_steps. 0, with
    ``refresh_every`` of 1, is synchronous training."""
    weights: Literal["files", "gloo", "nccl"] = "files"
    """How the LLM reaches the generator: as files of the run folder, or from the trainer's memory into the generator's,
    by gloo over TCP or by NCCL between GPUs. Snapshots then hold the recommender alone, but for the last one."""
    fresh: Literal["last", "random", "all"] = "last"
    """Which items of a history get freshly sampled texts: the last ``fresh_items``, so many random ones, or all."""
    fresh_items: int = Field(1, ge=1)
    others: Literal["stored", "newest"] = "stored"
    """What the other items of a history read: the text that Base+NA_LLM was trained on, or the newest one that the
    present version of the LLM wrote about the item, where it wrote one."""
    share_texts: bool = False
    """Whether all histories of a batch that hold a fresh item read the same texts of it, which saves generating and
    training on more; with texts of its own for each history the estimates are independent."""
    knowledge_on_target: bool = False
    """Whether scored candidates carry knowledge too."""
    knowledge_dropout: float = Field(0.0, ge=0, lt=1)
    id_dropout: float = Field(0.0, ge=0, le=1)
    """Share of the items of histories whose ID vector is left out while a recommender is trained. One that knows its
    training sequences by their IDs does not learn to read."""
    reward_users: float = Field(0.0, ge=0, lt=1)
    """Share of users whose pairs reward the LLM while no recommender is fitted to them before the last stage; with 0
    every training pair does both (the paper), and its reward tells hardly more than that the recommender knows it."""
    watch: list[str] = Field(default_factory=list)
    """Text columns of the item table. Of each, the log says how many texts are an item's entry there, and how much
    more reward those got than the others for the same pair."""
    standardise_knowledge: bool = True
    """Each entry of the text vectors to mean 0 and variance 1 over the texts that the recommender begins with."""
    finish: TrainConfig = TrainConfig()
    """Training of the recommender on the aligned LLM's knowledge, after alignment."""
    finish_from: Literal["aligned", "scratch"] = "aligned"
    """Whether that goes on with the aligned recommender, or begins with a new one as Base+NA_LLM did. One that has come
    to know its training sequences by heart has no reason left to read, however good the texts have become."""
    wait_timeout_s: float = Field(600, gt=0)
    """Longest wait of one job for the other before it gives up with a message."""
    max_restarts: int = Field(3, ge=0)
    """Restarts of a job that dies without having got any further."""

    @property
    def snapshots_in_use(self) -> int:
        """How many are published at most while a generator loads one, and that one."""
        # The trainer then gets as far as what is written already, and the turns of the other generators, reach.
        turns = (self.generator.processes - 1) * self.generator.batches_per_call
        return -(-(self.max_lag_steps + turns) // self.refresh_every) + 2

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.fresh == "all" and self.fresh_items != 1:
            raise ValueError("fresh=all leaves fresh_items nothing to say")
        if self.share_texts and self.objective.samples == 1 and self.objective.baseline == "leave-one-out":
            raise ValueError(
                "baseline=leave-one-out compares pairs where samples is 1, and share_texts makes those depend on each"
                " other: that would bias the gradient; raise objective.samples"
            )
        if self.weights != "files" and self.trainer.lora is not None:
            raise ValueError(f"weights={self.weights} is for whole models: adapters are small, and travel as files")
        if self.others == "newest" and self.generator.processes > 1:
            raise ValueError("others=newest needs generator.processes=1: several do not know what each other wrote")
        if self.max_lag_steps < self.refresh_every - 1:
            raise ValueError(
                f"max_lag_steps {self.max_lag_steps} is below refresh_every {self.refresh_every} - 1:"
                " the generator would wait for a snapshot that the trainer publishes only with more samples"
            )
        if self.trainer.keep_snapshots is not None and self.trainer.keep_snapshots < self.snapshots_in_use:
            raise ValueError(
                f"trainer.keep_snapshots {self.trainer.keep_snapshots} is below {self.snapshots_in_use}: the trainer"
                " could delete the snapshot that the generator is loading"
            )
        if self.trainer.batch_size % self.trainer.processes:
            raise ValueError(
                f"trainer.batch_size {self.trainer.batch_size} is not divisible by"
                f" trainer.processes {self.trainer.processes}"
            )
        return self


class MainJob(Section):
    """A recipe of the main job: ``recalign demo`` and ``recalign align``."""

    placement: ClassVar[tuple[str, ...]] = (
        "align.trainer.processes",
        "align.generator.processes",
        "align.generator.cpu_cores",
        "align.weights",
        "align.wait_timeout_s",
        "align.max_restarts",
    )

    data: str
    """A prepared folder, or the name of a built-in data set."""
    run: Path
    """The run folder."""
    train_users: float = Field(1.0, gt=0, le=1)
    """Share of the users whose interactions are trained on, drawn by ``rec.train.seed``; all are tested (Fig. 7)."""
    rec: RecConfig = RecConfig()
    llm: LLMConfig = LLMConfig()
    align: AlignConfig = AlignConfig()

    @model_validator(mode="after")
    def _canary_fits_the_precision(self) -> Self:
        exact = self.llm.engine.dtype == "float32" and not self.align.trainer.bf16
        if not exact and self.llm.engine.canary_tolerance < 0.02:
            raise ValueError(
                f"llm.engine.canary_tolerance {self.llm.engine.canary_tolerance:g} asks for float32 on both sides;"
                " 0.15 fits bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _recommenders_begin_with_their_own_items(self) -> Self:
        if not isinstance(self.rec.items, IDItems) or self.rec.train.start is not None:
            raise ValueError(
                "rec.items and rec.train.start are for 'recalign train': the main job's recommenders begin with IDs of"
                " their own, or the rows beside each other would not be of the same item table"
            )
        return self

    @model_validator(mode="after")
    def _calibrates_by_what_is_not_trained_on(self) -> Self:
        if self.align.objective.temperature == "calibrated" and self.rec.train.on != "train":
            raise ValueError("align.objective.temperature=calibrated needs validation items: set rec.train.on=train")
        return self

    @model_validator(mode="after")
    def _last_training_is_on_what_the_others_had(self) -> Self:
        rec, align = self.rec.train, self.align
        if align.finish.on != rec.on:
            raise ValueError(
                f"align.finish.on is {align.finish.on}, rec.train.on is {rec.on}: Base+SeRALM would be trained on other"
                " items than the rows beside it"
            )
        if align.finish_from == "aligned" and (align.finish.start is not None or align.finish.tune != "all"):
            raise ValueError("align.finish.start and tune have no meaning with finish_from=aligned")
        return self

    @property
    def identity(self) -> str:
        """Hash of what is computed: all keys but the place of the run folder and the placement.

        The number of ranks decides the last bits of a result too, but a run may go on with another one.
        """
        return hash_of(without(self.model_dump(mode="json"), ("run", *self.placement)))


def load_job(path: Path, overrides: Sequence[str] = ()) -> MainJob:
    """Read a recipe; the ``config.yaml`` of a run folder means that folder, wherever it lies now.

    Raises:
        UserError: on a missing file, an unknown key or an impossible value.
    """
    job = load(MainJob, path, [*run_override(path), *overrides])
    if job.rec.grid:
        raise UserError("rec.grid is for 'recalign train': the main job trains its recommender once")
    return job


class Stages:
    """Where the stages of a main job keep their things, inside its run folder."""

    def __init__(self, run: Path) -> None:
        self.run = Path(run)
        self.data = self.run / "data"
        self.base, self.llm, self.na, self.final = (self.run / name for name in ("base", "llm", "na", "seralm"))
        self.without_reward_users = self.run / "without-reward-users"
        self.na_knowledge = self.run / "knowledge" / "not-aligned.parquet"
        self.final_knowledge = self.run / "knowledge" / "aligned.parquet"
        self.snapshots, self.samples = self.run / "snapshots", self.run / "samples"
        self.exchange = self.run / "exchange.json"
        self.control = self.run / "control"
        self.checkpoints = self.run / "checkpoints"

    def aligning(self, align: AlignConfig) -> tuple[Path, Path]:
        """The recommenders that alignment begins with: the frozen one without knowledge, and the one that reads it."""
        folder = self.without_reward_users if align.reward_users else self.run
        return folder / self.base.name, folder / self.na.name

    def temperatures(self, align: AlignConfig) -> tuple[float, float]:
        """Those of the two recommenders that ``aligning`` names, where they reward."""
        fixed = align.objective.temperature
        if fixed != "calibrated":
            return fixed, fixed
        base, reading = (files.read_json(folder / TEMPERATURE) for folder in self.aligning(align))
        return base["temperature"], reading["temperature"]

    def llm_model(self, llm: LLMConfig) -> str:
        """The original LLM: the one the recipe names, or the one trained here."""
        return llm.model or str(self.llm / "model")

    def encoder_model(self, llm: LLMConfig) -> str:
        """The text encoder; ``llm`` is the original LLM, never the aligned one: a text keeps its vector."""
        return self.llm_model(llm) if llm.encoder.model == "llm" else llm.encoder.model

    def data_folder(self, data: str) -> Path:
        """The prepared folder: the named one, or that of a built-in data set."""
        return self.data if data in BUILTIN else Path(data)
