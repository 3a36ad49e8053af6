"""The LLM of the trainer job: under DeepSpeed, beside its frozen original."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator
from deepspeed import DeepSpeedEngine
from peft import LoraConfig as PeftLoRAConfig
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from align.config import AlignConfig, LoRAConfig, TrainerConfig
from align.objective import (
    effective_sample_fraction,
    exact_token_kl,
    importance_ratios,
    importance_weights,
    mismatch_kl,
    policy_loss,
    row_weights,
    sampled_kl,
)
from align.resharding import load_universal, make_universal
from align.samples import Sample, Text
from rec.runtime.errors import UserError
from rec.runtime.ranks import Ranks

ENGINE_TAG = "engine"


def deepspeed_config(trainer: TrainerConfig) -> dict[str, Any]:
    """The shipped DeepSpeed JSON of the recipe's stage, with what must be explicit filled in from the recipe."""
    name = f"zero{trainer.zero_stage}{'_offload' if trainer.offload else ''}.json"
    text = resources.files("ds_configs").joinpath(name).read_text()
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
        policy = _load(model) if trainer.lora is None else _with_adapters(_load(model), trainer.lora)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        # Steps on offloaded states are the CPU's, where the unfused optimizer takes several times as long.
        optimizer = torch.optim.AdamW(trained, lr=trainer.lr, weight_decay=0.0, fused=trainer.offload or None)
        self.engine: DeepSpeedEngine = accelerator.prepare(policy, optimizer)[0]
        assert self.engine.gradient_clipping() == trainer.clip_norm
        self.reference = self._frozen(model) if trainer.lora is None else None

    @property
    def stage(self) -> int:
        """The ZeRO stage that is really in use."""
        return self.engine.zero_optimization_stage()

    def update(self, step: int, samples: list[Sample], weights: Tensor) -> dict[str, float]:
        """One step of Eq. 8 on this rank's samples; returns figures of them, before the step.

        Args:
            step: counts the warm-up.
            samples: this rank's share of the batch.
            weights: [samples, k] from ``reward_weights``.
        """
        objective, rows = self.config.objective, Rows.of(samples, self.accelerator.device)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        reference_logits = self._reference_logits(rows)
        self.engine.train()
        logits = token_logits(self.engine, rows.ids, rows.places)
        logprobs, reference = (chosen_logprobs(values, rows.next_ids) for values in (logits, reference_logits))
        token_kl = exact_token_kl(logits, reference_logits) if objective.kl == "exact" else None
        weights, mask = weights.flatten().to(rows.ids.device), rows.mask
        ratios = importance_ratios(logprobs.detach(), rows.drawn, mask)
        importance = torch.ones_like(weights)
        if objective.max_importance is not None:
            importance = importance_weights(ratios, rows.texts, rows.samples, len(weights), objective.max_importance)
        weights, shares = row_weights(weights, importance.to(weights.dtype), rows.texts, rows.samples, len(rows.ids))
        loss = policy_loss(logprobs, reference, mask, weights, objective.alpha, len(importance), token_kl, shares)
        self.engine.backward(loss)
        self.engine.step()
        with torch.no_grad():
            return {
                "policy_loss": loss.item(),
                "kl": sampled_kl(logprobs, reference, mask, ratios).item(),
                "text_logprob": (logprobs * mask).sum(1).mean().item(),
                "importance_ratio": ratios.mean().item(),
                "effective_sample_fraction": effective_sample_fraction(ratios).item(),
                "mismatch_kl": mismatch_kl(logprobs, rows.drawn, mask).item(),
            }

    @torch.no_grad()
    def logprobs_of(self, token_ids: list[int]) -> list[float]:
        """log p of a fixed text's tokens from the second on, under the weights being trained; every rank calls this."""
        self.engine.eval()
        ids = torch.tensor([token_ids], device=self.accelerator.device)
        places = torch.arange(len(token_ids) - 1, device=ids.device)
        return chosen_logprobs(token_logits(self.engine, ids, places), ids[:, 1:])[0].tolist()

    def gathered_weights(self) -> dict[str, Tensor]:
        """All weights, or the adapters, on the CPU of rank 0 ({} elsewhere); every rank calls this.

        Under ZeRO-3 one parameter at a time is gathered, so that no device ever holds the whole model.
        """
        weights, adapters = {}, self.config.trainer.lora is not None
        for name, parameter in self.engine.module.named_parameters():
            if adapters and not parameter.requires_grad:
                continue
            with self._whole(parameter):
                if self.accelerator.is_main_process:
                    weights[name] = parameter.detach().cpu().clone()
        if adapters:
            return weights
        persistent = set(self.engine.module.state_dict())
        for name, buffer in self.engine.module.named_buffers():
            if self.accelerator.is_main_process and name in persistent:
                weights[name] = buffer.detach().cpu().clone()
        return weights

    def save_pretrained(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write gathered weights in Hugging Face format, adapters in peft's; rank 0 calls this."""
        self.engine.module.save_pretrained(folder, state_dict=weights)

    def save(self, folder: Path) -> None:
        """Write weights and optimizer of this rank; every rank calls this."""
        # DeepSpeed's own "latest" file is not atomic, and not needed: our manifest decides.
        adapters = self.config.trainer.lora is not None
        self.engine.save_checkpoint(
            str(folder / "llm"), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=adapters
        )

    def load(self, folder: Path, world_size: int | None = None) -> None:
        """Restore what ``save`` wrote on ``world_size`` ranks, or on as many as these; every rank calls this."""
        saved, ranks = folder / "llm", Ranks.current()
        if world_size in (None, ranks.size):
            whole = self.config.trainer.lora is None
            loaded, _ = self.engine.load_checkpoint(str(saved), tag=ENGINE_TAG, load_module_strict=whole)
        else:
            loaded = load_universal(self.engine, make_universal(saved, ENGINE_TAG, ranks), ENGINE_TAG)
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found nothing to load in {saved}")

    @torch.no_grad()
    def _reference_logits(self, rows: "Rows") -> Tensor:
        if self.reference is not None:
            return token_logits(self.reference, rows.ids, rows.places)
        self.engine.eval()
        with self.engine.module.disable_adapter():
            return token_logits(self.engine, rows.ids, rows.places)

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


@dataclass(frozen=True)
class Rows:
    """The different texts of some samples, one a row, with their prompts.

    Attributes:
        ids: [M, T] tokens of prompt and text, right-padded.
        places: [P] the stretch of places after which some row has a token of its text: no others are computed.
        mask: [M, P] 1 where the next token is a text's.
        drawn: [M, P] log p of these when they were drawn, 0 elsewhere.
        texts: [E] row of every text of every draw.
        samples: [E] number of that draw, counted through all samples.
    """

    ids: Tensor
    places: Tensor
    mask: Tensor
    drawn: Tensor
    texts: Tensor
    samples: Tensor

    @property
    def next_ids(self) -> Tensor:
        """[M, P] the tokens after the places."""
        return self.ids[:, (self.places + 1).clamp(max=self.ids.shape[1] - 1)]

    @classmethod
    def of(cls, samples: list[Sample], device: torch.device) -> "Rows":
        """A text that several histories share is one row, and one text of each."""
        found: dict[int, tuple[int, list[int], Text]] = {}
        holds: dict[tuple[int, int], None] = {}
        draws = [(sample, draw) for sample in samples for draw in sample.draws]
        for number, (sample, draw) in enumerate(draws):
            for prompt, text in zip(sample.prompts, draw, strict=True):
                row, _, _ = found.setdefault(text.seed, (len(found), prompt, text))
                holds[row, number] = None
        rows = [torch.tensor([*prompt, *text.token_ids]) for _, prompt, text in found.values()]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        starts = torch.tensor([len(prompt) - 1 for _, prompt, _ in found.values()])[:, None]
        ends = starts + torch.tensor([len(text.token_ids) for _, _, text in found.values()])[:, None]
        places = torch.arange(int(starts.min()), max(int(ends.max()), int(starts.min()) + 1))
        inside = (places >= starts) & (places < ends)
        drawn = torch.zeros(inside.shape)
        drawn[inside] = torch.tensor([value for _, _, text in found.values() for value in text.logprobs])
        texts, owners = torch.tensor(list(holds)).unbind(1)
        return cls(*(value.to(device) for value in (ids, places, inside.float(), drawn, texts, owners)))


def token_logits(model: torch.nn.Module, ids: Tensor, places: Tensor) -> Tensor:
    """[M, P, V] logits of ids[:, t + 1] given ids[:, :t + 1] for the ``places`` t [P], in float32.

    Rows are right-padded, so a causal model needs neither attention mask nor position ids.
    """
    return model(input_ids=ids, use_cache=False, logits_to_keep=places).logits.float()


def chosen_logprobs(logits: Tensor, next_ids: Tensor) -> Tensor:
    """[M, P] log p of the tokens ``next_ids`` [M, P], from ``token_logits``."""
    return logits.gather(-1, next_ids[..., None]).squeeze(-1) - logits.logsumexp(-1)


def layers_to_adapt(model: str, lora: LoRAConfig) -> list[str]:
    """Names of the layers that adapters go to, without loading any weights.

    Raises:
        UserError: if there are none.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    try:
        names = _with_adapters(empty, lora).targeted_module_names
    except ValueError as error:
        raise UserError(f"align.trainer.lora: {' '.join(str(error).split())[:200]}") from None
    if not names:
        raise UserError(f"align.trainer.lora.target_modules {lora.target_modules} names no layer of {model}")
    return names


def _with_adapters(model: PreTrainedModel, lora: LoRAConfig) -> PeftModel:
    """The model with adapters that change nothing yet, and are all that is trained."""
    settings = {"r": lora.rank, "lora_alpha": lora.alpha, "target_modules": lora.target_modules}
    # Without dropout: sampling, scoring and training must be the same distribution.
    return get_peft_model(model, PeftLoRAConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings))


def _load(model: str) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} is no causal LM: {str(error).strip().splitlines()[0]}") from error
