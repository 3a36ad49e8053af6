"""The LLM of the trainer job: under DeepSpeed, beside its frozen original."""

import contextlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed import DeepSpeedEngine
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from align.config import AlignConfig, TrainerConfig
from align.objective import effective_sample_fraction, importance_ratios, policy_loss, sampled_kl
from align.samples import Sample
from rec.runtime.errors import UserError

ENGINE_TAG = "engine"


def deepspeed_config(trainer: TrainerConfig) -> dict[str, Any]:
    """The shipped DeepSpeed JSON of the recipe's stage, with what must be explicit filled in from the recipe."""
    text = resources.files("ds_configs").joinpath(f"zero{trainer.zero_stage}.json").read_text()
    content = json.loads(text)
    content["train_micro_batch_size_per_gpu"] = trainer.batch_size // trainer.processes
    content["gradient_clipping"] = trainer.clip_norm
    content["bf16"] = {"enabled": trainer.bf16}
    return content


class Policy:
    """p(s|x) with parameters θ_l, and the frozen p_orig(s|x).

    Args:
        model: folder or hub name of the original LLM.
        config: the ``align`` section.
        accelerator: made with the DeepSpeed plugin of ``deepspeed_config``.
    """

    def __init__(self, model: str, config: AlignConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        trainer = config.trainer
        policy = _load(model)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=trainer.lr, weight_decay=0.0)
        self.engine: DeepSpeedEngine = accelerator.prepare(policy, optimizer)[0]
        assert self.engine.gradient_clipping() == trainer.clip_norm
        self.reference = self._frozen(model)

    @property
    def stage(self) -> int:
        """The ZeRO stage that is really in use."""
        return self.engine.zero_optimization_stage()

    def update(self, step: int, samples: list[Sample], weights: Tensor) -> dict[str, float]:
        """One step of Eq. 8 on this rank's samples; returns figures of them, before the step.

        Args:
            step: counts the warm-up.
            samples: this rank's share of the batch.
            weights: [samples] from ``reward_weights``.
        """
        device, alpha = self.accelerator.device, self.config.objective.alpha
        rows = [
            (prompt, tokens, drawn, weight)
            for sample, weight in zip(samples, weights.tolist(), strict=True)
            for prompt, tokens, drawn in zip(sample.prompts, sample.token_ids, sample.logprobs, strict=True)
        ]
        prompts, tokens, drawn, row_weights = zip(*rows, strict=True)
        ids, mask = _pad(prompts, tokens, device)
        row_weights = torch.tensor(row_weights, device=device)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        self.engine.train()
        logprobs = token_logprobs(self.engine, ids)
        with torch.no_grad():
            reference = token_logprobs(self.reference, ids)
        loss = policy_loss(logprobs, reference, mask, row_weights, alpha, len(samples))
        self.engine.backward(loss)
        self.engine.step()
        with torch.no_grad():
            ratios = importance_ratios(logprobs, _align_to(mask, drawn), mask)
            return {
                "policy_loss": loss.item(),
                "kl": sampled_kl(logprobs, reference, mask, ratios).item(),
                "text_logprob": (logprobs * mask).sum(1).mean().item(),
                "importance_ratio": ratios.mean().item(),
                "effective_sample_fraction": effective_sample_fraction(ratios).item(),
            }

    @torch.no_grad()
    def logprobs_of(self, token_ids: list[int]) -> list[float]:
        """log p of a fixed text's tokens from the second on, under the weights being trained; every rank calls this."""
        self.engine.eval()
        ids = torch.tensor([token_ids], device=self.accelerator.device)
        return token_logprobs(self.engine, ids)[0].tolist()

    def gathered_weights(self) -> dict[str, Tensor]:
        """The whole model's weights on the CPU of rank 0 ({} elsewhere); every rank calls this.

        Under ZeRO-3 one parameter at a time is gathered, so that no device ever holds the whole model.
        """
        weights = {}
        for name, parameter in self.engine.module.named_parameters():
            with self._whole(parameter):
                if self.accelerator.is_main_process:
                    weights[name] = parameter.detach().cpu().clone()
        persistent = set(self.engine.module.state_dict())
        for name, buffer in self.engine.module.named_buffers():
            if self.accelerator.is_main_process and name in persistent:
                weights[name] = buffer.detach().cpu().clone()
        return weights

    def save_pretrained(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write gathered weights in Hugging Face format; rank 0 calls this."""
        self.engine.module.save_pretrained(folder, state_dict=weights)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer of this rank; every rank calls this."""
        # DeepSpeed's own "latest" file is not atomic, and not needed: our manifest decides.
        self.engine.save_checkpoint(str(folder / "llm"), tag=ENGINE_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restore what ``save`` wrote; every rank calls this."""
        loaded, _ = self.engine.load_checkpoint(str(folder / "llm"), tag=ENGINE_TAG)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {folder / 'llm'}")

    def _learning_rate(self, step: int) -> float:
        trainer = self.config.trainer
        return trainer.lr * min(1.0, (step + 1) / max(1, trainer.warmup_steps))

    def _frozen(self, model: str) -> torch.nn.Module:
        """The original; whole on every rank, but sharded like the policy under ZeRO-3, where it may not fit."""
        reference = _load(model).eval().requires_grad_(False)
        if self.stage < 3:
            dtype = torch.bfloat16 if self.config.trainer.bf16 else torch.float32
            return reference.to(self.accelerator.device, dtype)
        content = deepspeed_config(self.config.trainer)
        content.pop("gradient_clipping")
        engine = deepspeed.initialize(model=reference, config=content)[0]
        engine.eval()  # returns nothing, unlike a module's
        return engine

    @contextlib.contextmanager
    def _whole(self, parameter: torch.nn.Parameter) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            yield


def token_logprobs(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """[M, T-1] log p(ids[:, t] | ids[:, :t]) for t ≥ 1, in float32.

    Rows are right-padded, so a causal model needs neither attention mask nor position ids.
    """
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return logits.gather(-1, ids[:, 1:, None]).squeeze(-1) - logits.logsumexp(-1)


def _load(model: str) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} is no causal LM: {str(error).strip().splitlines()[0]}") from error


def _pad(prompts: Any, tokens: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [M, T] of prompt and text, and a mask [M, T-1] of the log-probs that belong to texts."""
    rows = [torch.tensor([*prompt, *text]) for prompt, text in zip(prompts, tokens, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    starts = torch.tensor([len(prompt) - 1 for prompt in prompts])[:, None]
    ends = starts + torch.tensor([len(text) for text in tokens])[:, None]
    places = torch.arange(ids.shape[1] - 1)
    return ids.to(device), ((places >= starts) & (places < ends)).float().to(device)


def _align_to(mask: Tensor, drawn: Any) -> Tensor:
    """The sampling log-probs, laid out like ``mask``."""
    result = torch.zeros_like(mask)
    result[mask.bool()] = torch.tensor([value for row in drawn for value in row], device=mask.device)
    return result
