"""The recommender of the trainer job: it reads the texts and learns from the true next item."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from align.objective import recommender_loss
from align.samples import Sample
from align.scoring import Inputs, log_p_y_given_xs, make_inputs
from rec.models.base import SequenceRecommender
from rec.trainer import parameter_groups


class _Likelihood(nn.Module):
    """log p(y|x,s) as a forward pass, which is what DDP can synchronise."""

    def __init__(self, recommender: SequenceRecommender) -> None:
        super().__init__()
        self.recommender = recommender

    def forward(self, inputs: Inputs) -> Tensor:
        return log_p_y_given_xs(self.recommender, inputs)


class _EachTextOnce:
    """``read`` for one step: texts that it has read are not read again.

    Not for longer: a vector's last bits depend on the batch that it was encoded in, and a run that is started again has
    to have the same ones.
    """

    def __init__(self, read: Callable[[Sequence[str]], Tensor]) -> None:
        self.read = read
        self.rows: dict[str, int] = {}
        self.values = torch.empty(0)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        if not self.rows.keys() >= set(texts):
            self.rows, self.values = {text: row for row, text in enumerate(texts)}, self.read(texts)
        return self.values[[self.rows[text] for text in texts]]


class Reader:
    """The recommender with parameters θ_r, in DDP over all ranks.

    Args:
        recommender: trained with not-aligned knowledge.
        read: makes of texts what the recommender's items encode (``llm.text_items.reader_of``).
        lr: of Adam.
        device: of this rank.
        distributed: whether there are other ranks.
        temperature: of the likelihoods that rewarded; only ``reward_drift`` asks for it.
    """

    def __init__(
        self,
        recommender: SequenceRecommender,
        read: Callable[[Sequence[str]], Tensor],
        lr: float,
        device: torch.device,
        distributed: bool,
        temperature: float = 1.0,
    ) -> None:
        self.recommender, self.read, self.device = recommender.to(device), read, device
        self.temperature = temperature
        likelihood = _Likelihood(self.recommender)
        self.likelihood = DistributedDataParallel(likelihood, broadcast_buffers=False) if distributed else likelihood
        self.optimizer = torch.optim.Adam(parameter_groups(recommender), lr=lr, betas=(0.9, 0.98))

    def update(self, samples: list[Sample], rewarding: Sequence[Sample] | None = None) -> dict[str, float]:
        """One step of Eq. 9 on this rank's samples, every draw of each; returns figures from before the step.

        ``reward_drift`` is how far log p(y|x,s) has moved, in the mean over the first draws of the ``rewarding``
        samples, by default the same ones, since they were scored.
        """
        read = _EachTextOnce(self.read)
        inputs = make_inputs(samples, read).to(self.device)
        drift = self._drift(samples if rewarding is None else rewarding, read)
        self.likelihood.train()
        log_p = self.likelihood(inputs)
        loss = recommender_loss(log_p)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return {"rec_loss": loss.item(), "reward_drift": drift}

    @torch.no_grad()
    def _drift(self, samples: Sequence[Sample], read: Callable[[Sequence[str]], Tensor]) -> float:
        # One draw of each tells as well as all of them, whose texts may have to be encoded.
        first = [replace(sample, draws=sample.draws[:1]) for sample in samples]
        scored = torch.tensor([sample.log_p_y_given_xs[0] for sample in samples], device=self.device)
        inputs = make_inputs(first, read).to(self.device)
        now = log_p_y_given_xs(self.recommender.eval(), inputs, self.temperature)
        return (now - scored).abs().mean().item()

    def refresh(self) -> None:
        """Encode the stored texts again, where the encoder is trained; every rank calls this."""
        self.recommender.items.refresh()

    def save_pretrained(self, folder: Path) -> None:
        """Write the recommender; rank 0 calls this."""
        self.recommender.save_pretrained(folder)

    def state(self) -> dict[str, Any]:
        """Weights and optimizer."""
        return {"model": self.recommender.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what ``state`` returned."""
        self.recommender.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
