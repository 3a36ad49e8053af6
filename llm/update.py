"""One optimizer step on several losses: how the training loop meets its engine, and the plain one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from llm.corpus import LanguageBatch
from llm.joint import JointModel, PairBatch
from rec.runtime.checkpoint import Checkpoint


@dataclass(frozen=True)
class Part:
    """One term of a step's loss.

    Attributes:
        batch: what it is computed on.
        weight: of its mean loss, in this rank's loss; the mean over ranks is the step's.
    """

    batch: LanguageBatch | PairBatch
    weight: float = 1.0


class Engine(Protocol):
    """What trains a ``JointModel``; every rank makes the same calls.

    Attributes:
        device: where the model is.
        gradient_norm: of the newest step that was taken, over all weights, before clipping.
    """

    device: torch.device
    gradient_norm: float

    def step(self, parts: Sequence[Part], lr: float) -> list[float]:
        """Sum the gradients of the weighted parts, clip, step; the parts' own losses before the step."""

    def losses(self, batches: Sequence[LanguageBatch | PairBatch]) -> list[float]:
        """Losses without gradients."""

    def weights(self) -> dict[str, Tensor]:
        """All weights as float32 on the CPU of rank 0, {} elsewhere."""

    def state(self) -> dict[str, Any]:
        """What of it goes into this rank's part of a checkpoint."""

    def save(self, folder: Path) -> None:
        """Write what does not, into a checkpoint's folder."""

    def load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Restore what ``state`` and ``save`` kept, be it on another number of ranks."""


def parameter_groups(model: JointModel, weight_decay: float, heads_lr_factor: float = 1.0) -> list[dict[str, Any]]:
    """Matrices with weight decay, biases and norms without; the heads, if any, with a rate of their own, a multiple of
    the decoder's.
    """
    groups = []
    for part, factor in ((model.decoder, 1.0), (model.heads, heads_lr_factor)):
        matrices = [parameter for parameter in part.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in part.parameters() if parameter.dim() <= 1]
        groups.append({"params": matrices, "weight_decay": weight_decay, "lr_factor": factor})
        groups.append({"params": vectors, "weight_decay": 0.0, "lr_factor": factor})
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The decoder's learning rate, and the multiple of it that other groups have."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


class PlainEngine:
    """AdamW in one process.

    Args:
        model: moved to the GPU if there is one.
        lr: any; every step brings its own.
        weight_decay: of matrices.
        betas: of AdamW.
        eps: of AdamW.
        clip_norm: largest norm of all gradients together.
        heads_lr_factor: learning rate of the heads, in multiples of the decoder's.
    """

    def __init__(
        self,
        model: JointModel,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
        eps: float,
        clip_norm: float,
        heads_lr_factor: float = 1.0,
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.clip_norm, self.gradient_norm = model.to(self.device).train(), clip_norm, 0.0
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, weight_decay, heads_lr_factor), lr=lr, betas=betas, eps=eps,
            fused=True,
        )  # fmt: skip

    def step(self, parts: Sequence[Part], lr: float) -> list[float]:
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in parts:
            loss = self.model(part.batch.to(self.device))
            (loss if part.weight == 1 else loss * part.weight).backward()
            losses.append(loss.detach())
        self.gradient_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm).item()
        self.optimizer.step()
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def losses(self, batches: Sequence[LanguageBatch | PairBatch]) -> list[float]:
        return [self.model(batch.to(self.device)).item() for batch in batches]

    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.model.named_parameters()}

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def save(self, folder: Path) -> None:
        pass

    def load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
