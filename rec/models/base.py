"""What every sequence model has in common: scoring, and its folder on disk."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rec import item_encoder
from rec.item_encoder import ItemEncoder
from rec.runtime import files
from rec.runtime.config import Section, build
from rec.runtime.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


class SequenceRecommender(nn.Module):
    """Maps item sequences [B, L] to user states [B, L, D] and scores them against the item table [N + 1, D].

    Sequences are right-padded with 0. State l has read items 0 to l.
    """

    architecture = ""
    config_class: type[Section]

    def __init__(self, config: Section, items: ItemEncoder) -> None:
        super().__init__()
        self.config, self.items = config, items

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        """States [B, L, D] of item numbers ``items`` [B, L]; ``knowledge`` [B, L, K] replaces stored vectors."""
        raise NotImplementedError

    def scores(self, states: Tensor) -> Tensor:
        """Scores [..., N] of items 1 to N (column i is item i + 1) for states [..., D]."""
        return states @ self.items.table()[1:].T

    def last_states(self, items: Tensor, lengths: Tensor, knowledge: Tensor | None = None) -> Tensor:
        """[B, D] states after the whole of each sequence, for lengths [B] of at least 1."""
        states = self(items, knowledge)
        return states[torch.arange(len(items), device=items.device), lengths - 1]

    def log_likelihood(
        self, items: Tensor, lengths: Tensor, targets: Tensor, knowledge: Tensor | None = None
    ) -> Tensor:
        """[B] log p(y|x) of the next items ``targets`` [B] (numbers from 1), softmax over all items."""
        scores = self.scores(self.last_states(items, lengths, knowledge)).float()
        return scores.log_softmax(-1).gather(-1, targets[:, None] - 1).squeeze(-1)

    def save_pretrained(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(
            folder / CONFIG,
            {
                "architecture": self.architecture,
                "config": self.config.model_dump(mode="json"),
                "item_encoder": {"kind": self.items.kind, **self.items.settings()},
            },
        )
        temporary = folder / f"{files.TEMPORARY_PREFIX}{WEIGHTS}"
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary)
        files.fsync(temporary)
        temporary.replace(folder / WEIGHTS)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "SequenceRecommender":
        """Rebuild the model that ``save_pretrained`` wrote, in evaluation mode.

        Raises:
            UserError: if a file is missing, or names an architecture that is not here.
        """
        from rec.models import MODELS

        try:
            described: dict[str, Any] = files.read_json(folder / CONFIG)
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no recommender: {error}") from error
        if described.get("architecture") not in MODELS:
            raise UserError(f"{folder}: unknown recommender {described.get('architecture')!r}")
        model_class = MODELS[described["architecture"]]
        settings = dict(described["item_encoder"])
        items = item_encoder.build(settings.pop("kind"), settings)
        model = model_class(build(model_class.config_class, described["config"]), items)
        model.load_state_dict(weights)
        return model.eval()
