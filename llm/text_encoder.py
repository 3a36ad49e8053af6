"""r_s = Encoder(s) (SeRALM, Eq. 2): a frozen Hugging Face model, mean-pooled over the tokens of the text."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel

from llm.config import EncoderConfig
from llm.tokenizer import load_tokenizer
from rec.runtime.errors import UserError


class TextEncoder:
    """Texts to vectors [len(texts), K], each normalised to zero mean and unit variance over its K entries.

    Mean pooling serves encoders and decoders alike. The normalisation keeps any encoder's vectors at one scale,
    so that a recommender's settings do not depend on which one is used.

    Args:
        model: folder or hub name.
        config: longest text and batch size.
    """

    def __init__(self, model: str | Path, config: EncoderConfig) -> None:
        self.tokenizer = load_tokenizer(model, has_end=False)
        try:
            self.model = AutoModel.from_pretrained(str(model)).eval().requires_grad_(False)
        except (OSError, ValueError) as error:
            raise UserError(f"{model} is no text encoder: {str(error).strip().splitlines()[0]}") from error
        self.config = config
        self.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def to(self, device: torch.device) -> None:
        """Encode on ``device`` from now on."""
        self.model.to(device)

    @property
    def dim(self) -> int:
        """Width K of the vectors."""
        return self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode; texts of like length share a batch, an empty text becomes a vector of zeros."""
        vectors = torch.zeros(len(texts), self.dim)
        limit = min(self.config.max_tokens, getattr(self.model.config, "max_position_embeddings", 2**20))
        ids = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"] if texts else []
        order = sorted((row for row in range(len(ids)) if ids[row]), key=lambda row: len(ids[row]))
        for begin in range(0, len(order), self.config.batch_size):
            rows = order[begin : begin + self.config.batch_size]
            batch = self.tokenizer.pad(
                {"input_ids": [ids[row] for row in rows]}, padding_side="right", return_tensors="pt"
            ).to(self.model.device)
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None]
            vectors[rows] = torch.nn.functional.layer_norm((hidden * mask).sum(1) / mask.sum(1), (self.dim,)).cpu()
        return vectors
