"""DeepSpeed ZeRO under ``accelerate launch``, as an engine of the pretraining loop."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import deepspeed
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from llm.corpus import LanguageBatch
from llm.joint import JointModel, PairBatch
from llm.launched import require_processes, shipped_deepspeed, use_own_ninja
from llm.lmrec_job import LMRecTrainConfig
from llm.resharding import restore
from llm.update import Part, parameter_groups, set_learning_rate
from rec.runtime.checkpoint import Checkpoint
from rec.runtime.ranks import timeout

TAG = "engine"


def deepspeed_config(train: LMRecTrainConfig) -> dict[str, Any]:
    """The shipped DeepSpeed JSON of the recipe's stage, with what must be explicit filled in from the recipe.

    bf16 is not DeepSpeed's here but autocast, as in LMRec: weights and reductions stay float32.
    """
    content = shipped_deepspeed(train.zero_stage, train.clip_norm)
    if train.precision == "fp16":
        content["fp16"] = {"enabled": True, "loss_scale": 0, "initial_scale_power": 16}
    return content


def start_group(train: LMRecTrainConfig) -> None:
    """The process group: gloo on CPU, NCCL on GPU.

    Raises:
        UserError: if another number of processes was started than the recipe says.
    """
    use_own_ninja()
    # Named on CPU: without it every process would believe that it is alone.
    backend = {} if torch.cuda.is_available() else {"backend": "gloo"}
    state = PartialState(timeout=timeout(), **backend)
    require_processes("llm.train.processes", train.processes, state.num_processes)


def shard_no_more() -> None:
    """What transformers loads from now on is whole, on rank 0 alone."""
    unset_hf_deepspeed_config()


def make_accelerator(train: LMRecTrainConfig) -> Accelerator:
    """DeepSpeed on the process group of ``start_group``."""
    return Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=deepspeed_config(train)),
        mixed_precision="fp16" if train.precision == "fp16" else "no",
    )


class ZeroEngine:
    """A ``JointModel`` under ZeRO.

    Args:
        model: made before the accelerator, which shards whatever is made after it under ZeRO-3.
        train: of the recipe.
        accelerator: from ``make_accelerator``.
        heads_lr_factor: learning rate of the heads, in multiples of the decoder's.
    """

    def __init__(
        self, model: JointModel, train: LMRecTrainConfig, accelerator: Accelerator, heads_lr_factor: float = 1.0
    ) -> None:
        self.device, self.gradient_norm = accelerator.device, 0.0
        # The loss reads the tied table outside of the layer that owns it; ZeRO-3 must be told to gather it there too.
        deepspeed.zero.register_external_parameter(model, model.decoder.get_output_embeddings().weight)
        optimizer = torch.optim.AdamW(
            parameter_groups(model, train.weight_decay, heads_lr_factor), lr=train.lr, betas=train.betas, eps=train.eps
        )
        self.engine = accelerator.prepare(model.train(), optimizer)[0]
        # accelerate and DeepSpeed both fall back to other values without a word.
        assert self.engine.gradient_clipping() == train.clip_norm
        assert self.engine.zero_optimization_stage() == train.zero_stage

    def step(self, parts: Sequence[Part], lr: float) -> list[float]:
        set_learning_rate(self.engine.optimizer, lr)
        losses = []
        for nth, part in enumerate(parts, start=1):
            self.engine.set_gradient_accumulation_boundary(nth == len(parts))
            loss = self.engine(part.batch.to(self.device))
            self.engine.backward(loss * part.weight)
            losses.append(loss.detach())
        self.engine.step()
        if not getattr(self.engine.optimizer, "overflow", False) or self.engine.loss_scale() == 1:
            self.gradient_norm = float(self.engine.get_global_grad_norm())
        return [loss.item() for loss in losses]

    @torch.no_grad()
    def losses(self, batches: Sequence[LanguageBatch | PairBatch]) -> list[float]:
        return [self.engine(batch.to(self.device)).item() for batch in batches]

    def weights(self) -> dict[str, Tensor]:
        found = {}
        for name, parameter in self.engine.module.named_parameters():
            with self._whole(parameter):
                if self.engine.global_rank == 0:
                    found[name] = parameter.detach().float().cpu().clone()
        return found

    def state(self) -> dict[str, Any]:
        return {}

    def save(self, folder: Path) -> None:
        # DeepSpeed's own "latest" file is not atomic, and not needed: our manifest decides.
        self.engine.save_checkpoint(str(folder / "zero"), tag=TAG, save_latest=False)

    def load(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        restore(self.engine, checkpoint.folder / "zero", TAG, checkpoint.world_size)

    @contextlib.contextmanager
    def _whole(self, parameter: torch.nn.Parameter) -> Iterator[None]:
        """Under ZeRO-3 one parameter at a time is gathered, so that no device ever holds the whole model."""
        if self.engine.zero_optimization_stage() < 3:
            yield
            return
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=None):
            yield
