"""stage-PT's loss: item-item contrast plus masked language modelling, over parts of like length.

    L = L_contrast + λ (L_mlm of the histories + L_mlm of the next items)        (RECFORMER, Eq. 9)

L_contrast has a weight of its own here (``contrast_weight``): what either objective is worth alone is a question.

Parts are only how the encoder's work is divided: loss and gradient are those of one big batch (gradient caching, Gao
et al. 2021; here the parts' activations are recomputed in the one backward pass, by ``torch.utils.checkpoint``).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm.recformer.batches import TokenBatch, TokenSequences, pad, parts_of
from llm.recformer.config import OptimizerConfig, RecformerPretrainConfig
from llm.recformer.contrastive import item_contrast
from llm.recformer.mlm import MaskedLMHead
from llm.recformer.model import RecformerModel
from rec.precision import autocast
from rec.runtime.ranks import Ranks


@dataclass(frozen=True)
class PretrainBatch:
    """This rank's share of a global batch: B histories, then the B items that follow them.

    Attributes:
        plain: [2 B] sequences.
        masked: [2 B] the same with tokens masked.
        numbers: [B] the next items' numbers.
        labels: how many tokens of the global batch are to be predicted, in histories and in next items.
    """

    plain: TokenSequences
    masked: TokenSequences
    numbers: Tensor
    labels: tuple[int, int]


class Parts:
    """How a rank's sequences go through the encoder.

    Args:
        model: the encoder.
        pad_token: id of [PAD].
        stage: the size of parts, and whether their activations are kept.
    """

    def __init__(self, model: RecformerModel, pad_token: int, stage: OptimizerConfig) -> None:
        self.pad_token, self.stage, self.multiple = pad_token, stage, model.length_multiple
        self.device = next(model.parameters()).device

    def rows(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Rows in parts of like length."""
        return parts_of(lengths, self.stage.part_tokens, self.multiple)

    def batches(self, sequences: TokenSequences, parts: list[np.ndarray]) -> list[TokenBatch]:
        """The parts with their padding, on the model's device."""
        return [pad(sequences, rows, self.pad_token, self.multiple).to(self.device) for rows in parts]

    def run(self, function: Callable, batches: list[TokenBatch]) -> list:
        """``function`` of every batch under autocast; what it leaves to the backward pass is kept or recomputed."""

        def under_autocast(batch: TokenBatch):
            with autocast(self.device, self.stage.precision):
                return function(batch)

        if self.stage.recompute and len(batches) > 1 and torch.is_grad_enabled():
            under_autocast = partial(checkpoint, under_autocast, use_reentrant=False)
        return [under_autocast(batch) for batch in batches]


def in_order(found: list[Tensor], batches: list[TokenBatch]) -> Tensor:
    """The rows of parts [b, D] in the order of the sequences, [B, D]."""
    places = torch.cat([batch.rows for batch in batches])
    return torch.cat(found)[places.argsort().to(found[0].device)]


def encode(model: RecformerModel, sequences: TokenSequences, parts: Parts) -> Tensor:
    """[B, D] vectors of the sequences."""
    batches = parts.batches(sequences, parts.rows(sequences.lengths))
    return in_order(parts.run(model.vectors, batches), batches)


class Objective(nn.Module):
    """The loss of a batch as a forward pass, which is what DDP and DeepSpeed synchronise.

    Args:
        model: the encoder.
        head: of masked language modelling.
        stage: weights and kinds of losses, and of passes.
        temperature: τ of the contrast.
        pad_token: id of [PAD].
    """

    def __init__(
        self,
        model: RecformerModel,
        head: MaskedLMHead,
        stage: RecformerPretrainConfig,
        temperature: float,
        pad_token: int,
    ) -> None:
        super().__init__()
        self.model, self.head, self.stage = model, head, stage
        self.temperature, self.pad_token = temperature, pad_token
        head.requires_grad_(stage.mlm_weight > 0)
        # Words and their bias are one table of the cross-entropy: a gradient of either costs that of both.
        words_are_tuned = model.backbone.get_input_embeddings().weight.requires_grad
        head.bias.requires_grad_(stage.mlm_weight > 0 and words_are_tuned)

    def forward(self, batch: PretrainBatch) -> tuple[Tensor, dict[str, Tensor | int]]:
        """This rank's loss, whose mean over ranks is the batch's; and figures of this rank."""
        parts, predict = Parts(self.model, self.pad_token, self.stage), self.stage.mlm_weight > 0
        rows, places = self._rows(parts, batch.plain.lengths), 0
        batches = parts.batches(batch.masked if self.stage.shared_pass and predict else batch.plain, rows)
        mlm = torch.zeros((), device=parts.device)
        if self.stage.shared_pass and predict:
            found = parts.run(self._both, batches)
            vectors = in_order([vector for vector, _ in found], batches)
            mlm = self._mlm(batch, [hidden for _, hidden in found], batches)
        else:
            vectors = in_order(parts.run(self.model.vectors, batches), batches)
            if predict:
                again = parts.batches(batch.masked, rows)
                mlm = self._mlm(batch, [hidden for _, hidden in parts.run(self._both, again)], again)
                places += sum(part.ids.numel() for part in again)
        places += sum(part.ids.numel() for part in batches)
        histories, next_items = vectors.chunk(2)
        numbers, duplicates = batch.numbers.to(vectors.device), self.stage.duplicates == "mask"
        contrast, hits = item_contrast(histories, next_items, numbers, self.temperature, duplicates)
        figures = {
            "contrast": contrast.detach(),
            "mlm": mlm.detach(),
            "accuracy": hits.float().mean(),
            "tokens": len(batch.plain.ids),
            "places": places,
        }
        return self.stage.contrast_weight * contrast + self.stage.mlm_weight * mlm, figures

    def _rows(self, parts: Parts, lengths: np.ndarray) -> list[np.ndarray]:
        if self.stage.by_length:
            return parts.rows(lengths)
        sides = np.split(np.arange(len(lengths)), 2)
        size = self.stage.micro_batch
        return [side[begin : begin + size] for side in sides for begin in range(0, len(side), size)]

    def _both(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Vectors [b, D] of a part, and the hidden states [m, D] of the tokens that are to be predicted."""
        hidden = self.model(batch).last_hidden_state
        return hidden[:, 0].float(), hidden[batch.labels >= 0].float()

    def _mlm(self, whole: PretrainBatch, hidden: list[Tensor], batches: list[TokenBatch]) -> Tensor:
        """The mean cross-entropy of the histories' masked tokens plus that of the next items'.

        Weighted so that the mean over ranks is the mean over the global batch's labels. All parts at once: every call
        of the head reads the whole vocabulary.
        """
        states = torch.cat(hidden)
        labels = torch.cat([batch.labels[batch.labels >= 0] for batch in batches])
        owners = torch.cat(
            [batch.rows.to(states.device).repeat_interleave((batch.labels >= 0).sum(1)) for batch in batches]
        )
        table = self.model.backbone.get_input_embeddings().weight
        # A rank that has nothing to predict adds nothing, but takes part: DDP waits for every weight.
        loss = 0.0 * sum(parameter.sum() for parameter in self.head.parameters())
        is_history = owners < len(whole.numbers)
        for own, total in zip((is_history, ~is_history), whole.labels, strict=True):
            share = Ranks.current().size * int(own.sum()) / max(1, total)
            if share:
                with autocast(states.device, self.stage.precision):
                    loss = loss + share * self.head(states[own], table, labels[own])
        return loss
