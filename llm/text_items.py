"""Item encoders that read texts: with vectors that a frozen encoder made, or with an encoder that is trained with the
recommender (SeRALM, 4.3, leaves open which).
"""

import copy
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from llm.text_encoder import TextEncoder, pooled
from rec.item_encoder import KnowledgeConcat

ROWS = 256  # texts that are encoded at a time where nothing is trained


class TrainedText(KnowledgeConcat):
    """r = W [r_id ; Encoder(s)], the encoder's weights being trained with the recommender's.

    While training, the texts of a batch's items are encoded anew, an item's once for all its places. What else is read
    (candidates, and everything outside training) are the vectors of the last ``refresh``, so that a saved recommender
    answers without running the encoder.

    Args:
        n_items: items are numbered from 1.
        dim: width D of ID and output vectors.
        encoder: the Hugging Face config of the encoder, as a dictionary.
        encoder_lr: learning rate of the encoder's weights.
        options: see ``KnowledgeConcat``; entries are standardised by what the untrained encoder made.
    """

    kind = "trained-text"

    def __init__(self, n_items: int, dim: int, encoder: dict[str, Any], encoder_lr: float, **options: Any) -> None:
        config = AutoConfig.for_model(**encoder)
        super().__init__(n_items, dim, config.hidden_size, **options)
        self.encoder_lr = encoder_lr
        self.encoder = _without_pooler(AutoModel.from_config(config, dtype=torch.float32))
        self.register_buffer("tokens", None, persistent=False)  # [N + 1, m, T] of m texts an item

    @classmethod
    def from_encoder(cls, n_items: int, dim: int, encoder: TextEncoder, **options: Any) -> "TrainedText":
        """With the weights of ``encoder`` to begin with."""
        config = json.loads(encoder.model.config.to_json_string(use_diff=False))
        items = cls(n_items, dim, config, encoder.config.lr, **options)
        # Trained in float32, whatever the checkpoint has: Adam's steps are lost on half-precision weights.
        items.encoder = _without_pooler(copy.deepcopy(encoder.model).cpu().float().requires_grad_(True))
        return items

    def set_texts(self, tokens: Tensor) -> None:
        """Read the texts of items 1 to N from now on: [N, m, T] token ids of m texts an item, and encode the first."""
        none = torch.full_like(tokens[:1], -1)
        self.tokens = torch.cat([none, tokens]).to(self.knowledge.device)
        self.set_knowledge(self._first_vectors())

    def refresh(self) -> None:
        if self.tokens is not None:
            self.knowledge[1:] = self._first_vectors()

    def encode(self, texts: Tensor) -> Tensor:
        """[U, K] vectors of the texts with token ids [U, T]."""
        return pooled(self.encoder, texts)

    def own_rates(self) -> dict[float, list[nn.Parameter]]:
        return {self.encoder_lr: list(self.encoder.parameters())}

    def settings(self) -> dict[str, Any]:
        settings = super().settings()
        del settings["knowledge_dim"]
        config = json.loads(self.encoder.config.to_json_string(use_diff=False))
        return {**settings, "encoder": config, "encoder_lr": self.encoder_lr}

    def _stored(self, items: Tensor) -> Tensor:
        if self.tokens is None or not self.training:
            return self.knowledge[items]
        unique, places = items.unique(return_inverse=True)
        draws = torch.randint(self.tokens.shape[1], unique.shape, device=items.device)
        return self.encode(self.tokens[unique, draws])[places]

    @torch.no_grad()
    def _first_vectors(self) -> Tensor:
        was_training = self.encoder.training
        self.encoder.eval()
        vectors = torch.cat([self.encode(rows) for rows in self.tokens[1:, 0].split(ROWS)])
        self.encoder.train(was_training)
        return vectors


class CatalogTexts:
    """The texts of a catalog, as recommenders read them.

    Args:
        texts: [N m] m texts an item, those of an item one after the other.
        encoder: of the texts; its config says whether a recommender trains a copy of it.
    """

    def __init__(self, texts: Sequence[str], encoder: TextEncoder) -> None:
        self.texts, self.encoder = texts, encoder

    def items(self, n_items: int, dim: int, **options: Any) -> KnowledgeConcat:
        """A new item encoder of width ``dim`` that reads them; ``options`` are those of ``KnowledgeConcat``."""
        if self.encoder.config.trained:
            items: KnowledgeConcat = TrainedText.from_encoder(n_items, dim, self.encoder, **options)
        else:
            items = KnowledgeConcat(n_items, dim, self.encoder.dim, **options)
        self.tell(items)
        return items

    def tell(self, items: KnowledgeConcat) -> None:
        """Let ``items`` read them from now on."""
        if isinstance(items, TrainedText):
            items.set_texts(self.encoder.tokens(self.texts).unflatten(0, (items.n_items, -1)))
        else:
            items.set_knowledge(self._vectors.unflatten(0, (items.n_items, -1)))

    @functools.cached_property
    def _vectors(self) -> Tensor:
        return self.encoder(self.texts)


def reader_of(items: KnowledgeConcat, encoder: TextEncoder) -> Callable[[Sequence[str]], Tensor]:
    """What makes of texts that are not stored what ``items.encode`` takes: token ids or vectors."""
    return encoder.tokens if isinstance(items, TrainedText) else encoder


def vectors_by(items: KnowledgeConcat, encoder: TextEncoder) -> Callable[[Sequence[str]], Tensor]:
    """Texts to the vectors [len(texts), K] that ``items`` would read."""
    if not isinstance(items, TrainedText):
        return encoder
    own = copy.copy(encoder)
    own.model = items.encoder
    return own


def _without_pooler(model: nn.Module) -> nn.Module:
    """BERT's pooler plays no part in the mean, and a weight without a gradient stops distributed training."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    return model
