"""The ``llm`` section of a recipe."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from llm.recformer.config import RecformerSettings
from rec.precision import Precision
from rec.runtime.config import Section

PRESETS: dict[str, dict[str, int]] = {
    "1.7M": {"layers": 4, "dim": 32, "heads": 4, "ffn": 128},
    "7M": {"layers": 4, "dim": 128, "heads": 4, "ffn": 512},
    "20M": {"layers": 8, "dim": 256, "heads": 8, "ffn": 1024},
    "64M": {"layers": 12, "dim": 512, "heads": 8, "ffn": 2048},
    "125M": {"layers": 12, "dim": 768, "heads": 12, "ffn": 3072},
    "210M": {"layers": 24, "dim": 768, "heads": 16, "ffn": 3072},
    "125M-printed": {"layers": 12, "dim": 768, "heads": 12, "ffn": 2048},
    "210M-printed": {"layers": 24, "dim": 768, "heads": 16, "ffn": 2048},
}
"""Table 9 of LMRec. The table prints d_ffn 2048 for the last two, which then count 106M and 173M parameters; with 4 x
d_emb, as in all its other rows, they are what their names say."""
PRESET_VOCABULARY, PRESET_CONTEXT = 50_258, 2048


class LMRecConfig(Section):
    """Size of an LM that is trained from scratch on behaviour histories (LMRec architecture)."""

    preset: Literal["1.7M", "7M", "20M", "64M", "125M", "210M", "125M-printed", "210M-printed"] | None = None
    """A row of LMRec's Table 9: what the keys below are where the recipe does not give them."""
    vocabulary: int = Field(4096, ge=300)
    """Byte-level BPE tokens at most, special ones included; a preset's is 50,258."""
    context: int = Field(128, ge=16)
    """Positions; also the length of a training row, in tokens. A preset's is 2,048."""
    dim: int = Field(128, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    ffn: int | None = Field(None, ge=1)
    """Width of the MLP's inner layer; null for 4 x ``dim``."""

    @model_validator(mode="before")
    @classmethod
    def _preset_fills_in(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("preset") not in PRESETS:
            return given
        sizes = {**PRESETS[given["preset"]], "vocabulary": PRESET_VOCABULARY, "context": PRESET_CONTEXT}
        return sizes | given

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
    precision: Precision = "auto"
    checkpoint_every: int = Field(200, ge=1)
    """Steps."""
    seed: int = Field(42, ge=0)

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
    seed: int = Field(42, ge=0)


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
    recformer: RecformerSettings | None = None
    """A RECFORMER; a recipe with this section trains one."""
