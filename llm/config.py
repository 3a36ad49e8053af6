"""The ``llm`` section of a recipe."""

from typing import Literal, Self

from pydantic import Field, model_validator

from rec.runtime.config import Section


class LMRecConfig(Section):
    """Size of an LM that is trained from scratch on behaviour histories (LMRec architecture)."""

    vocabulary: int = Field(4096, ge=300)
    """Byte-level BPE tokens, special ones included."""
    context: int = Field(128, ge=16)
    """Positions; also the length of a training row, in tokens."""
    dim: int = Field(128, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not divisible by heads {self.heads}")
        return self


class PretrainConfig(Section):
    """How that LM is trained: AdamW, linear warm-up, cosine decay to a tenth."""

    on: Literal["histories", "knowledge"] = "histories"
    """``histories``: items as users met them (LMRec). ``knowledge``: what ``knowledge_columns`` say of each item, after
    the prompt about it, so that the LM can say such things."""
    knowledge_columns: list[str] = Field(default_factory=list)
    """Columns of the prepared ``items.parquet``, each with one text an item; an LM that is trained on several learns to
    say any one of them. Empty texts are left out."""
    knowledge_share: float = Field(1.0, gt=0, le=1)
    """Share of the items, drawn by ``seed``, whose texts are trained on."""

    lr: float = Field(2e-3, gt=0)
    batch_size: int = Field(64, ge=1)
    """Rows of ``context`` tokens a step."""
    epochs: int = Field(3, ge=1)
    warmup_fraction: float = Field(0.02, ge=0, le=1)
    weight_decay: float = Field(0.1, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    bf16: bool = True
    """Autocast to bfloat16, on CPU too."""
    checkpoint_every: int = Field(200, ge=1)
    """Steps."""
    seed: int = 42

    @model_validator(mode="after")
    def _knowledge_has_columns(self) -> Self:
        if (self.on == "knowledge") != bool(self.knowledge_columns):
            raise ValueError("on=knowledge and knowledge_columns go together")
        if self.on == "histories" and self.knowledge_share != 1:
            raise ValueError("knowledge_share is for on=knowledge")
        return self


class KnowledgeConfig(Section):
    """What is asked about an item and how long the answer may be."""

    prompt: str = "{item} →"
    """Template of the prompt; ``{item}`` is the item's text. For a model that follows instructions name a built-in
    template (``llm.prompts.TEMPLATES``) or write one; its chat template is applied when its tokenizer has one."""
    max_new_tokens: int = Field(32, ge=1)
    temperature: float = Field(1.0, ge=0)
    """Of catalog generation. During alignment it is always 1, without top-p or top-k: Eq. 6 is an expectation
    under p(s|x) itself."""
    texts: int = Field(1, ge=1)
    """Texts of each item. A recommender that is trained on several reads a random one each time, and the first one
    otherwise."""
    seed: int = 42


class EncoderConfig(Section):
    """The text encoder of Eq. 2."""

    model: str = "llm"
    """A folder or hub name of any Hugging Face encoder or decoder; ``llm`` is the unaligned LLM itself."""
    max_tokens: int = Field(64, ge=1)
    batch_size: int = Field(256, ge=1)
    trained: bool = False
    """Whether every recommender that reads texts trains a copy of it; frozen, a text keeps its vector, which is much
    faster."""
    lr: float = Field(2e-5, gt=0)
    """Of that copy."""


class EngineConfig(Section):
    """The vLLM engine."""

    dtype: str = "float32"
    """``bfloat16`` on GPUs."""
    kv_cache_gib: int = Field(1, ge=1)
    """On CPU; a GPU's share is ``gpu_memory_utilization``."""
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1)
    max_num_seqs: int = Field(256, ge=1)
    canary_tolerance: float = Field(1e-3, gt=0)
    """Largest allowed log-prob difference between trainer and engine, in nats; 0.15 fits bfloat16."""


class LLMConfig(Section):
    """The language model and everything that reads or writes text."""

    model: str | None = None
    """A causal LM, folder or hub name; null trains a small one on the training histories."""
    item_text: str = "{title}"
    """Template of an item's text; names in braces are columns of the prepared ``items.parquet``."""
    lmrec: LMRecConfig = LMRecConfig()
    train: PretrainConfig = PretrainConfig()
    knowledge: KnowledgeConfig = KnowledgeConfig()
    encoder: EncoderConfig = EncoderConfig()
    engine: EngineConfig = EngineConfig()
