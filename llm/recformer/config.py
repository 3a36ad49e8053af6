"""The ``llm.recformer`` section of a recipe."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from rec.config import EvaluateConfig
from rec.precision import Precision
from rec.protocol import PRESETS
from rec.runtime.config import Section

TunedLayers = Literal["all", "none"] | list[Annotated[int, Field(ge=0)]]


class TextConfig(Section):
    """Items as text: "title …, brand …, category …", one key and one value an attribute (RECFORMER, 2.1)."""

    attributes: list[str] = Field(["title", "brand", "category"], min_length=1)
    """Columns of the prepared ``items.parquet`` in the order in which they are read; those that a catalog lacks are
    left out, so that one recipe serves catalogs that differ. A column's name is its key."""
    attribute_tokens: int = Field(32, ge=1)
    """Tokens of one attribute, key and value together; what is longer is cut."""
    allow_empty: bool = False
    """Take items whose attributes are all empty; they then differ in nothing. Otherwise they are an error."""


class SizeConfig(Section):
    """What of a history is read."""

    max_items: int = Field(50, ge=1)
    """The newest so many items."""
    max_tokens: int = Field(512, ge=8)
    """[CLS] included; what is older is cut. The backbone needs as many positions."""
    extend_positions: bool = False
    """Where the backbone has fewer positions, repeat its position vectors, as Longformer was made from RoBERTa."""
    attention_window: int = Field(64, ge=2, multiple_of=2)
    """Of a Longformer, in every layer; other backbones attend to everything."""
    new_embedding_std: float = Field(0.0, ge=0)
    """Deviation of the two embeddings that a backbone does not have, token type and item position, as they begin. The
    authors' code draws them with 0.02; with 0 the untuned model is exactly the pretrained one."""


class OptimizerConfig(Section):
    """AdamW under a rate that rises over the warm-up and falls linearly to 0."""

    lr: float = Field(5e-5, gt=0)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    clip_norm: float | None = Field(1.0, gt=0)
    tune_layers: TunedLayers = "all"
    """Transformer layers that are tuned, counted from 0 (Elephant, Table 1). A list leaves out the backbone's own
    embeddings too; the new ones are tuned but with ``none``, which tunes nothing at all."""
    freeze_word_embeddings: bool = False
    precision: Precision = "auto"
    part_tokens: int = Field(8192, ge=1)
    """Sequences of like length go through the encoder together, so many tokens at a time, padding included."""
    recompute: bool = False
    """Keep the activations of one such part alone and compute those of the others again in the backward pass (gradient
    caching): memory then does not depend on the batch. Loss and gradient are the same."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints that are kept."""
    keep_checkpoint_every: int | None = Field(None, ge=1)
    """The first checkpoint of every so many steps is kept for good; null for none."""
    seed: int = 42


class RecformerPretrainConfig(OptimizerConfig):
    """stage-PT: masked language modelling and item-item contrast, on the training parts of the sources."""

    sources: list[str] = Field(default_factory=list)
    """Prepared folders; none means the recipe's own ``data``."""
    users: int | None = Field(None, ge=1)
    """At most so many users, drawn from all sources alike."""
    share: float = Field(1.0, gt=0, le=1)
    """Share of these users (Elephant, Fig. 2)."""
    batch_size: int = Field(64, ge=2)
    """Sequences a step over all ranks, and so the candidates that each has to tell its next item from."""
    epochs: int = Field(32, ge=1)
    steps: int | None = Field(None, ge=1)
    """Steps in all, in as many epochs as they take; null for ``epochs``. Shares of the users then differ in users
    alone, and not in steps too."""
    clip_norm: float | None = Field(1.0, gt=0)
    freeze_word_embeddings: bool = True
    """As the authors' code does."""
    mask_ratio: float = Field(0.15, gt=0, lt=1)
    whole_words: bool = True
    """Mask all tokens of a word together."""
    mlm_weight: float = Field(0.1, ge=0)
    """Of the histories' and of the next items' masked language modelling each."""
    contrast_weight: float = Field(1.0, ge=0)
    duplicates: Literal["mask", "keep"] = "mask"
    """Another row whose next item is the same: no negative, or one as in the authors' code."""
    shared_pass: bool = True
    """One encoder pass for both objectives, over the masked text; otherwise the contrast reads the text unmasked in a
    pass of its own, as in the authors' code, at twice the cost."""
    by_length: bool = True
    """Histories and next items share passes with others of like length; otherwise histories and next items each have
    passes of their own, ``micro_batch`` rows padded to their longest, as in the authors' code."""
    micro_batch: int = Field(16, ge=1)
    """Rows of such a pass; 16 in the authors' code."""
    evaluate_every: int = Field(200, ge=1)
    """Steps between validations; the weights with the best one are kept."""
    valid_users: int = Field(1024, ge=2)
    """Users at most whose validation items are told from each other's, in batches of ``batch_size``."""

    @model_validator(mode="after")
    def _has_an_objective(self) -> Self:
        if not self.mlm_weight and not self.contrast_weight:
            raise ValueError("mlm_weight and contrast_weight are both 0: nothing is left to learn")
        if self.tune_layers == "none":
            raise ValueError("tune_layers is none: the stage would tune nothing; leave it out with pretrain=null")
        return self


class RecformerFinetuneConfig(OptimizerConfig):
    """stage-FT1 and stage-FT2 on the recipe's ``data``."""

    warmup_steps: int = Field(100, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    batch_size: int = Field(128, ge=1)
    """Users a step over all ranks."""
    epochs: int = Field(128, ge=1)
    """Of stage-FT1, at most; the learning rate reaches 0 there."""
    fixed_epochs: int = Field(128, ge=0)
    """Of stage-FT2, at most."""
    users_per_epoch: float = Field(1.0, gt=0, le=1)
    """Share of the users that an epoch draws; each gives one random prefix of its history."""
    evaluate_every: int = Field(3, ge=1)
    """Epochs between validations."""
    patience: int = Field(5, ge=1)
    """Validations without a better NDCG@10 before a stage ends; the paper's code waits 5, then 3 or 5."""
    valid_users: int | None = Field(None, ge=1)
    """Validate on so many users, drawn once and for all; null for all."""
    test_users: int | None = Field(None, ge=1)
    """Rank so many test items, drawn once and for all; null for all."""
    test_first_stage: bool = False
    """Rank the test items with stage-FT1's best too, which is what stage-FT2 begins with."""
    train_table: bool = False
    """In stage-FT2 train the item table along (Elephant, Table 5); otherwise it is fixed."""
    table_lr: float = Field(1e-3, gt=0)
    """Of that table: at an encoder's rate its vectors would hardly move in the steps of a stage."""
    evaluate: EvaluateConfig = EvaluateConfig(cutoffs=(5, 10, 50))
    """Of validation; its cutoffs are those of the test too."""
    protocols: list[str] = Field(["elephant-100", "elephant-full"], min_length=1)
    """Presets under which the test items are ranked at the end."""
    cold_targets: Literal["drop", "rank", "miss"] | None = None
    """Test items that never occur in training; null for what each preset does with them."""

    @field_validator("protocols")
    @classmethod
    def _are_known(cls, names: list[str]) -> list[str]:
        if unknown := [name for name in names if name not in PRESETS]:
            raise ValueError(f"unknown protocol {unknown[0]!r}; there are: {', '.join(PRESETS)}")
        return names


class RecformerSettings(Section):
    """RECFORMER: backbone, text, size and the stages of training."""

    backbone: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A Longformer or any other encoder, folder or hub name; or a RECFORMER that was saved, to go on from."""
    text: TextConfig = TextConfig()
    size: SizeConfig = SizeConfig()
    temperature: float = Field(0.05, gt=0)
    """Of the cosine similarity."""
    attention_dropout: float | None = Field(0.0, ge=0, lt=1)
    """Of attention's weights while training; null for the backbone's own (0.1 in BERT and Longformer, and so in the
    paper). Anything but 0 rules out fused attention: every weight of every head is then made, and kept for the backward
    pass."""
    processes: int = Field(1, ge=1)
    """Ranks of the whole job."""
    zero_stage: Literal[0, 1, 2] = 0
    """0: DDP. RECFORMER is small (150M parameters with Longformer), so sharding weights (stage 3) is not offered."""
    pretrain: RecformerPretrainConfig | None = None
    """stage-PT; null leaves it out."""
    finetune: RecformerFinetuneConfig | None = None
    """stage-FT1 and stage-FT2; null leaves them out."""

    @model_validator(mode="after")
    def _batches_divide(self) -> Self:
        for name in ("pretrain", "finetune"):
            stage = getattr(self, name)
            if stage is not None and stage.batch_size % self.processes:
                raise ValueError(f"{name}.batch_size {stage.batch_size} is no multiple of processes {self.processes}")
        return self
