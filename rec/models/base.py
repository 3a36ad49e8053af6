"""What recommenders have in common: training, scoring, and their folder on disk."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rec import item_encoder
from rec.data.prepared import Prepared
from rec.item_encoder import ItemEncoder
from rec.losses import Loss
from rec.runtime import files
from rec.runtime.config import Section, build
from rec.runtime.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Batch:
    """What one training step sees.

    Attributes:
        users: [B] user numbers.
        items: [B, L] input items, right-padded with 0.
        targets: [B, L] the item to predict at each place, 0 where there is none to predict.
    """

    users: Tensor
    items: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on ``device``."""
        return Batch(*(value.to(device, non_blocking=True) for value in vars(self).values()))


class Recommender(nn.Module):
    """Anything that ranks all items for a user.

    Attributes:
        architecture: its name in recipes and on disk.
        config_class: its size and options.
        samples: what it is trained on. ``next-item``: whole sequences, a target after every item, for models whose
            states never look ahead. ``prefix``: every prefix is a sample of its own with one target, for models
            that look at a whole sequence. ``cloze``: sequences with masked items. ``pairs``: (user, item) alone.
        has_own_loss: whether ``training_loss`` leaves the loss that it is given unused.
    """

    architecture: ClassVar[str] = ""
    config_class: ClassVar[type[Section]]
    samples: ClassVar[Literal["next-item", "prefix", "cloze", "pairs"]]
    has_own_loss: ClassVar[bool] = False

    def __init__(self, config: Section, items: ItemEncoder) -> None:
        super().__init__()
        self.config, self.items = config, items

    @property
    def reach(self) -> int:
        """How many items, the last ones of a history, its scores depend on."""
        return self.config.max_length

    def training_loss(self, batch: Batch, loss: Loss) -> Tensor:
        """Mean loss over the batch's targets."""
        raise NotImplementedError

    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        """Scores [B, N] of items 1 to N (column i is item i + 1).

        Args:
            users: [B] user numbers.
            items: [B, L] histories, right-padded with 0.
            lengths: [B] of at least 1.
        """
        raise NotImplementedError

    def save_pretrained(self, folder: Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        folder.mkdir(parents=True, exist_ok=True)
        files.write_json(
            folder / CONFIG,
            {
                "architecture": self.architecture,
                "config": self.config.model_dump(mode="json"),
                "item_encoder": {"kind": self.items.kind, **self.items.settings()},
                **self.extra_settings(),
            },
        )
        temporary = folder / f"{files.TEMPORARY_PREFIX}{WEIGHTS}"
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary)
        files.fsync(temporary)
        temporary.replace(folder / WEIGHTS)

    @classmethod
    def for_data(cls, config: Section, items: ItemEncoder, data: Prepared, ends: Tensor) -> "Recommender":
        """An untrained model for ``data``; most models need to know nothing more of it than the items.

        ``ends`` [users] is where each user's interactions that are trained on end (exclusive), in ``data.sequence``.
        """
        return cls(config, items)

    def extra_settings(self) -> dict[str, Any]:
        """Sizes that neither the config nor the item encoder knows, under names that ``build_empty`` takes."""
        return {}

    @classmethod
    def build_empty(cls, config: Section, items: ItemEncoder, **extra: Any) -> "Recommender":
        """A model to load weights into; ``extra`` is what ``extra_settings`` wrote."""
        return cls(config, items, **extra)

    @staticmethod
    def from_pretrained(folder: Path) -> "Recommender":
        """Rebuild the model that ``save_pretrained`` wrote, in evaluation mode.

        Raises:
            UserError: if a file is missing, or names an architecture that is not here.
        """
        from rec.models import MODELS

        try:
            described: dict[str, Any] = files.read_json(folder / CONFIG)
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder} holds no recommender: {error}") from error
        architecture = described.pop("architecture", None)
        if architecture not in MODELS:
            raise UserError(f"{folder}: unknown recommender {architecture!r}")
        model_class = MODELS[architecture]
        try:
            settings = described.pop("item_encoder")
            items = item_encoder.build(settings.pop("kind"), settings)
            config = build(model_class.config_class, described.pop("config"))
            model = model_class.build_empty(config, items, **described)
            model.load_state_dict(weights)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        except (KeyError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder} is damaged, its files do not belong together: {reason}") from error
        return model.eval()


class SequenceRecommender(Recommender):
    """Maps item sequences [B, L] to user states [B, L, D] and scores them against the item table [N + 1, D].

    A model says how in one of two ways. ``samples = "next-item"``: ``forward`` gives all states, state l having read
    items 0 to l and nothing after. Otherwise ``states_at`` and ``last_states`` give the states that are asked for.
    Its config has ``dim`` D and ``max_length``, the longest history it reads.
    """

    def forward(self, items: Tensor, knowledge: Tensor | None = None) -> Tensor:
        """States [B, L, D] of item numbers ``items`` [B, L]; ``knowledge`` [B, L, K] replaces stored vectors."""
        raise NotImplementedError

    def states_at(self, items: Tensor, where: Tensor, knowledge: Tensor | None = None) -> Tensor:
        """[M, D] states at the M places that ``where`` [B, L] (bool) marks, row by row."""
        return self(items, knowledge)[where]

    def last_states(self, items: Tensor, lengths: Tensor, knowledge: Tensor | None = None) -> Tensor:
        """[B, D] states after the whole of each sequence, for lengths [B] of at least 1."""
        states = self(items, knowledge)
        return states[torch.arange(len(items), device=items.device), lengths - 1]

    def scores(self, states: Tensor, out: Tensor | None = None, table: Tensor | None = None) -> Tensor:
        """Scores [..., N] of items 1 to N (column i is item i + 1) for states [..., D].

        Without gradients they can be written into ``out``. ``table`` [N, D] are the items' vectors, of whoever has them
        already: an item encoder may have to compute them.
        """
        return torch.matmul(states, (self.items.table()[1:] if table is None else table).T, out=out)

    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        return self.scores(self.last_states(items, lengths))

    def training_loss(self, batch: Batch, loss: Loss) -> Tensor:
        where = batch.targets > 0
        states = self.states_at(batch.items, where)
        return loss(states, self.items.table()[1:], batch.targets[where] - 1)

    def log_likelihood(
        self,
        items: Tensor,
        lengths: Tensor,
        targets: Tensor,
        knowledge: Tensor | None = None,
        temperature: float = 1.0,
    ) -> Tensor:
        """[B] log p(y|x) of the next items ``targets`` [B] (numbers from 1), softmax of scores / temperature."""
        scores = self.scores(self.last_states(items, lengths, knowledge)).float() / temperature
        return scores.log_softmax(-1).gather(-1, targets[:, None] - 1).squeeze(-1)

    def check_length(self, items: Tensor) -> None:
        """Raise ValueError if ``items`` [B, L] is longer than the model reads."""
        if items.shape[1] > self.config.max_length:
            raise ValueError(f"sequences of {items.shape[1]} items, the model reads {self.config.max_length}")
