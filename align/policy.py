"""The LLM of the trainer job: under DeepSpeed, beside its frozen original."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
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
from transformers.core_model_loading import revert_weight_conversion

from align.config import AlignConfig, LoRAConfig, ObjectiveConfig, TrainerConfig
from align.logprobs import scored
from align.objective import (
    draw_log_ratios,
    importance_weights,
    log_ratios,
    mismatch_kl,
    policy_loss,
    row_weights,
)
from align.samples import Sample, Text
from llm.causal_lm import load_causal_lm
from llm.end_to_end import EndToEnd, logits_at, use_end_to_end
from llm.launched import shipped_deepspeed
from llm.resharding import restore
from rec.runtime.errors import UserError

ENGINE_TAG = "engine"


def deepspeed_config(trainer: TrainerConfig) -> dict[str, Any]:
    """The shipped DeepSpeed JSON of the recipe's stage, with what must be explicit filled in from the recipe."""
    content = shipped_deepspeed(trainer.zero_stage, trainer.clip_norm, trainer.offload)
    content["train_micro_batch_size_per_gpu"] = trainer.batch_size // trainer.processes
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
        whole = load_causal_lm(model)
        self.end_to_end = use_end_to_end(whole)
        policy = whole if trainer.lora is None else _with_adapters(whole, trainer.lora)
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

    def update(self, step: int, samples: list[Sample], weights: Tensor) -> tuple[float, dict[str, Tensor], Tensor]:
        """One step of Eq. 8 on this rank's samples.

        Args:
            step: counts the warm-up.
            samples: this rank's share of the batch.
            weights: [samples, k] from ``reward_weights``.

        Returns:
            The loss; what ``policy_figures`` wants to know of each text, [M] of all; and logs of the importance ratios
            of the draws, [samples k]. All from before the step.
        """
        objective, rows = self.config.objective, Rows.of(samples, self.accelerator.device)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = self._learning_rate(step)
        reference_logits = self._reference_logits(rows)
        reference, _ = scored(reference_logits, rows.next_ids)
        if objective.kl == "sampled":
            reference_logits = None  # all that is needed of them is known
        self.engine.train()
        logits = logits_at(self.engine, rows.laid, rows.places, self.end_to_end)
        chosen, token_kl = scored(logits, rows.next_ids, reference_logits)
        del logits, reference_logits
        logprobs, reference, token_kl, mask = *map(rows.by_text, (chosen, reference, token_kl)), rows.mask
        loss, ratios, of_draws = loss_of(objective, rows, weights.to(mask.device), logprobs, reference, token_kl)
        self.engine.backward(loss)
        self.engine.step()
        with torch.no_grad():
            texts = {
                "log_ratio": ratios,
                "logprob": (logprobs * mask).sum(1),
                "from_original": ((logprobs - reference) * mask).sum(1),
                "mismatch": mismatch_kl(logprobs, rows.drawn, mask),
                "tokens": mask.sum(1),
            }
        return loss.item(), {name: values.cpu() for name, values in texts.items()}, of_draws.cpu()

    @torch.no_grad()
    def logprobs_of(self, token_ids: list[int]) -> list[float]:
        """log p of a fixed text's tokens from the second on, under the weights being trained; every rank calls this."""
        self.engine.eval()
        laid = EndToEnd.of([token_ids], self.accelerator.device)
        places = torch.arange(len(token_ids) - 1, device=laid.ids.device)
        return scored(logits_at(self.engine, laid, places, self.end_to_end), laid.ids[0, 1:])[0].tolist()

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
                    weights[name] = parameter.detach().to("cpu", copy=True)
        if adapters:
            return weights
        persistent = set(self.engine.module.state_dict())
        for name, buffer in self.engine.module.named_buffers():
            if self.accelerator.is_main_process and name in persistent:
                weights[name] = buffer.detach().to("cpu", copy=True)
        return weights

    def as_in_files(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gathered weights by the names, and in the shapes, that the model has in files."""
        return revert_weight_conversion(self.engine.module, dict(weights))

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

    def load(self, folder: Path, world_size: int) -> None:
        """Restore what ``save`` wrote on ``world_size`` ranks; every rank calls this."""
        whole = self.config.trainer.lora is None
        restore(self.engine, folder / "llm", ENGINE_TAG, world_size, strict=whole)

    @torch.no_grad()
    def _reference_logits(self, rows: "Rows") -> Tensor:
        if self.reference is not None:
            return logits_at(self.reference, rows.laid, rows.places, self.end_to_end)
        self.engine.eval()
        with self.engine.module.disable_adapter():
            return logits_at(self.engine, rows.laid, rows.places, self.end_to_end)

    def _learning_rate(self, step: int) -> float:
        trainer = self.config.trainer
        return trainer.lr * min(1.0, (step + 1) / max(1, trainer.warmup_steps))

    def _frozen(self, model: str) -> torch.nn.Module:
        """The original; whole on every rank, but sharded like the policy under ZeRO-3, where it may not fit."""
        reference = load_causal_lm(model).eval().requires_grad_(False)
        use_end_to_end(reference)
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
    """The M different texts of some samples, with their prompts.

    Attributes:
        laid: prompts and texts, end to end.
        places: [P] the places in it after which a token of a text stands: no other logits are computed.
        next_ids: [P] these tokens.
        mask: [M, T] 1 for the tokens of each text, T being the longest one's.
        drawn: [M, T] log p of these when they were drawn, 0 elsewhere.
        texts: [E] row of every text of every draw.
        samples: [E] number of that draw, counted through all samples.
    """

    laid: EndToEnd
    places: Tensor
    next_ids: Tensor
    mask: Tensor
    drawn: Tensor
    texts: Tensor
    samples: Tensor

    def by_text(self, values: Tensor) -> Tensor:
        """[M, T] what [P] ``values`` are of each text, 0 where it has no token."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask.bool(), values)

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
        texts = [text for _, _, text in found.values()]
        laid = EndToEnd.of([[*prompt, *text.token_ids] for _, prompt, text in found.values()], device)
        lengths = torch.tensor([len(text.token_ids) for text in texts])
        inside = torch.arange(max(1, int(lengths.max()))) < lengths[:, None]
        # The last tokens of each are its text's; each is foretold by the place before it.
        begins = laid.bounds[1:].cpu() - lengths - 1
        places = (begins[:, None] + torch.arange(inside.shape[1]))[inside]
        drawn = torch.zeros(inside.shape)
        drawn[inside] = torch.tensor([value for text in texts for value in text.logprobs])
        next_ids = torch.tensor([token for text in texts for token in text.token_ids], dtype=torch.long)
        held, owners = torch.tensor(list(holds)).unbind(1)
        return cls(laid, *(value.to(device) for value in (places, next_ids, inside.float(), drawn, held, owners)))


def loss_of(
    objective: ObjectiveConfig, rows: Rows, weights: Tensor, logprobs: Tensor, reference: Tensor, token_kl: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the LLM descends, from log-probs and divergences [M, T] of the ``rows``.

    Args:
        objective: how.
        rows: the texts of some samples.
        weights: [samples, k] from ``reward_weights``.
        logprobs: under the LLM that is trained; carries the gradient.
        reference: under the original.
        token_kl: carries the gradient; used where the KL is exact.

    Returns:
        The loss, and logs of the importance ratios of texts [M] and draws [samples k].
    """
    ratios = log_ratios(logprobs.detach(), rows.drawn, rows.mask)
    of_draws = draw_log_ratios(ratios, rows.texts, rows.samples, weights.numel())
    importance = torch.ones_like(weights.flatten())
    if objective.max_importance is not None:
        importance = importance_weights(of_draws, objective.max_importance).to(weights.dtype)
    of_rows, shares = row_weights(weights.flatten(), importance, rows.texts, rows.samples, len(rows.mask))
    exact = token_kl if objective.kl == "exact" else None
    loss = policy_loss(logprobs, reference, rows.mask, of_rows, objective.alpha, len(importance), exact, shares)
    return loss, ratios, of_draws


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
