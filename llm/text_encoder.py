"""r_s = Encoder(s) (SeRALM, Eq. 2): a Hugging Face model, mean-pooled over the tokens of the text."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel

from llm.config import EncoderConfig
from llm.tokenizer import load_tokenizer
from rec.runtime.errors import UserError

NO_TOKEN = -1  # right padding of token ids


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

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """[len(texts), T] token ids, right-padded with ``NO_TOKEN``; T is the longest text's, cut at the limit.

        An empty text has none, also of a tokenizer that puts its own tokens around every text.
        """
        # RoBERTa counts positions from its padding token on; its tokenizer knows how many that leaves.
        positions = getattr(self.model.config, "max_position_embeddings", 2**20)
        limit = min(self.config.max_tokens, positions, self.tokenizer.model_max_length)
        ids = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"] if texts else []
        told = [row if text else [] for text, row in zip(texts, ids, strict=True)]
        rows = [torch.tensor(row, dtype=torch.long) for row in [*told, [NO_TOKEN]]]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_TOKEN)[: len(texts)]

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Encode; texts of like length share a batch, an empty text becomes a vector of zeros."""
        vectors, ids = torch.zeros(len(texts), self.dim), self.tokens(texts)
        lengths = (ids != NO_TOKEN).sum(1)
        by_length = lengths.argsort(stable=True)
        for rows in by_length.split(self.config.batch_size) if texts else ():
            vectors[rows] = pooled(self.model, ids[rows].to(self.model.device)).cpu()
        return vectors


def pooled(model: nn.Module, ids: Tensor) -> Tensor:
    """[U, K] normalised vectors of texts [U, T] as ``TextEncoder.tokens`` gives them; zeros for one without tokens."""
    lengths = (ids != NO_TOKEN).sum(1, keepdim=True)
    # Attention to nothing at all is no number: a text without tokens sees one, and is taken out again below.
    longest = max(1, int(lengths.max()))
    mask = torch.arange(longest, device=ids.device) < lengths.clamp(min=1)
    hidden = model(input_ids=ids[:, :longest].clamp(min=0), attention_mask=mask.long()).last_hidden_state.float()
    mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    return nn.functional.layer_norm(mean, mean.shape[-1:]) * (lengths > 0)
