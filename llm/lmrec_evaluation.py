"""LMRec as a recommender: what ``rec``'s evaluator ranks with."""

from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm.corpus import ItemTokens
from llm.joint import Head, JointModel, Statistics
from llm.packing import Packed
from llm.recommendation import TextRows
from rec.models.base import Recommender
from rec.runtime import files
from rec.runtime.config import Section

# Not beside the decoder's weights: vLLM reads every safetensors file of a model's folder.
HEADS = "heads.safetensors"
ITEMS_AT_ONCE, HISTORIES_AT_ONCE = 1024, 64


class ReaderConfig(Section):
    """What the evaluator asks of any recommender."""

    max_length: int = Field(ge=1)
    """Longest history, in items: more than fit are given, and the latest that fit are read."""


class LMRecRecommender(Recommender):
    """Scores <W_u z_u, W_i z_i> of Eq. 4 for whole catalogs; item vectors are computed once.

    Args:
        model: the decoder with the task's heads.
        task: its name.
        tokens: of the catalog's items.
        context: positions of the decoder.
    """

    architecture = "LMRec"

    def __init__(self, model: JointModel, task: str, tokens: ItemTokens, context: int) -> None:
        nn.Module.__init__(self)
        self.config = ReaderConfig(max_length=context)
        self.model, self.task, self.rows = model, task, TextRows(tokens, context)
        self._items: Tensor | None = None

    @torch.no_grad()
    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        if self._items is None:
            self._items = self.item_vectors()
        rows = items.cpu().numpy() - 1
        histories = [row[:length] for row, length in zip(rows, lengths.tolist(), strict=True)]
        return self.user_vectors(histories) @ self._items.T

    @torch.no_grad()
    def item_vectors(self) -> Tensor:
        """[N, D] W_i z_i of all items."""
        numbers = np.arange(len(self.rows.tokens.head))
        parts = np.array_split(numbers, -(-len(numbers) // ITEMS_AT_ONCE))
        return torch.cat([self.model.item_vectors(self.task, *self._moved(self.rows.items(part))) for part in parts])

    @torch.no_grad()
    def user_vectors(self, histories: list[np.ndarray]) -> Tensor:
        """[B, D] W_u z_u of histories of item numbers from 0."""
        parts = [
            self.rows.histories(histories[begin : begin + HISTORIES_AT_ONCE])
            for begin in range(0, len(histories), HISTORIES_AT_ONCE)
        ]
        return torch.cat([self.model.user_vectors(self.task, *self._moved(part)) for part in parts])

    def _moved(self, made: tuple[Packed, Tensor]) -> tuple[Packed, Tensor]:
        device = next(self.parameters()).device
        return made[0].to(device), made[1].to(device)


def save_model(
    folder: Path, model: JointModel, weights: dict[str, Tensor], tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Write gathered weights: the decoder as any Hugging Face model under ``name``, the heads beside that folder."""
    decoder = {key.removeprefix("decoder."): value for key, value in weights.items() if key.startswith("decoder.")}
    model.decoder.save_pretrained(folder / name, state_dict=decoder)
    tokenizer.save_pretrained(folder / name)
    if heads := {key.removeprefix("heads."): value for key, value in weights.items() if key.startswith("heads.")}:
        _write(folder, heads)


def save_heads(folder: Path, model: JointModel) -> None:
    """Write W_u and W_i of every task, and the statistics of their features."""
    heads = {name: value.cpu() for name, value in model.heads.state_dict().items()}
    for name, head in _named(model):
        if head.statistics is not None:
            heads |= {f"{name}.{key}": value.cpu() for key, value in head.statistics._asdict().items()}
    _write(folder, heads)


def load_heads(folder: Path, model: JointModel) -> bool:
    """Give a model the heads that were written there; whether their statistics were too."""
    found = load_file(folder / HEADS)
    known = True
    for name, head in _named(model):
        statistics = [found.pop(f"{name}.{key}", None) for key in Statistics._fields]
        if known := known and statistics[0] is not None:
            head.statistics = Statistics(*(value.to(head.linear.weight.device) for value in statistics))
    model.heads.load_state_dict(found)
    return known


def _named(model: JointModel) -> list[tuple[str, Head]]:
    return [(name, module) for name, module in model.heads.named_modules() if isinstance(module, Head)]


def _write(folder: Path, heads: dict[str, Tensor]) -> None:
    temporary = folder / f"{files.TEMPORARY_PREFIX}{HEADS}"
    save_file({name: value.contiguous() for name, value in heads.items()}, temporary)
    files.fsync(temporary)
    temporary.replace(folder / HEADS)
