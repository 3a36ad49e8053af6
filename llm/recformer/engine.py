"""A model under ``accelerate launch``: DDP, or DeepSpeed ZeRO-1 or 2, on CPU or GPU, in checkpoints of our own."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn

from llm.launched import require_processes, shipped_deepspeed, use_own_ninja
from llm.recformer.config import OptimizerConfig, RecformerSettings
from llm.resharding import restore
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import hash_of
from rec.runtime.ranks import Ranks, timeout

ENGINE_TAG = "engine"


def make_accelerator(settings: RecformerSettings, stage: OptimizerConfig) -> Accelerator:
    """The process group (gloo on CPU, NCCL on GPU), and DeepSpeed if the recipe asks for it: the recipe decides,
    whatever accelerate's own configuration says.

    Raises:
        UserError: if another number of processes was started than the recipe says.
    """
    use_own_ninja()
    on_gpu, several = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", "1")) > 1
    plugin = None
    if settings.zero_stage:
        plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(settings, stage))
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
    # Named on CPU, or several processes would each believe that they are alone; one alone refuses a name, but to
    # DeepSpeed, which wants a group even then.
    named = not on_gpu and (several or plugin is not None)
    kwargs = [DistributedDataParallelKwargs(broadcast_buffers=False)]
    if several or plugin is not None:
        kwargs.append(InitProcessGroupKwargs(timeout=timeout(), backend="gloo" if named else None))
    accelerator = Accelerator(
        deepspeed_plugin=plugin, kwargs_handlers=kwargs, cpu=not on_gpu and plugin is None, mixed_precision="no"
    )
    require_processes("llm.recformer.processes", settings.processes, accelerator.num_processes)
    return accelerator


def deepspeed_config(settings: RecformerSettings, stage: OptimizerConfig) -> dict[str, Any]:
    """The shipped DeepSpeed JSON of the recipe's stage, with what must be explicit filled in from the recipe."""
    content = shipped_deepspeed(settings.zero_stage, stage.clip_norm or 0.0)
    content["train_micro_batch_size_per_gpu"] = stage.batch_size // settings.processes
    return content


class Engine:
    """One module in training: its optimizer, its rate, its checkpoints.

    Args:
        module: gives a scalar loss; called through the engine once a step.
        stage: how it is trained.
        settings: how many processes, and which kind of sharding.
        total: steps after which the rate is 0.
        accelerator: from ``make_accelerator``.
        own_rates: rates of parameters that do not have the stage's, by their names; they rise and fall alike.
    """

    def __init__(
        self,
        module: nn.Module,
        stage: OptimizerConfig,
        settings: RecformerSettings,
        total: int,
        accelerator: Accelerator,
        own_rates: Mapping[str, float] | None = None,
    ) -> None:
        self.module, self.stage, self.total, self.accelerator = module, stage, total, accelerator
        groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                groups.setdefault((own_rates or {}).get(name, stage.lr), []).append(parameter)
        self.scales = [rate / stage.lr for rate in groups]
        optimizer = torch.optim.AdamW(
            [{"params": parameters} for parameters in groups.values()],
            lr=stage.lr,
            weight_decay=stage.weight_decay,
            fused=True,
        )
        self.engine, self.optimizer = accelerator.prepare(module, optimizer)
        self.sharded = settings.zero_stage > 0
        self.ranks = Ranks.current()

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return self.accelerator.device

    def update(self, step: int, *inputs: Any) -> tuple[Tensor, Any]:
        """One optimizer step; returns the loss of this rank before it and what else the module gave.

        Dropout is a function of (seed, step, rank), so a resumed run draws the same.
        """
        torch.manual_seed(int(hash_of([self.stage.seed, step, self.ranks.rank])[:15], 16))
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = scale * linear_rate(step, self.total, self.stage)
        self.module.train()
        loss, told = self.engine(*inputs)
        if self.sharded:  # clips by its own configuration
            self.engine.backward(loss)
            self.engine.step()
        else:
            self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(loss)
            if self.stage.clip_norm is not None:
                self.accelerator.clip_grad_norm_(self.module.parameters(), self.stage.clip_norm)
            self.optimizer.step()
        return loss.detach(), told

    def weights(self) -> dict[str, Tensor]:
        """A copy of all weights, on the CPU; ZeRO-1 and 2 keep them whole on every rank."""
        return {name: value.detach().cpu().clone() for name, value in self.module.state_dict().items()}

    def save(self, checkpoints: Checkpoints, step: int, state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Write a checkpoint of ``step`` finished steps with this rank's ``state``; every rank calls this."""
        if self.sharded:
            checkpoints.save(step, state, meta, self._write)
            return
        own = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        checkpoints.save(step, {**state, **own}, meta)

    def resume(self, checkpoints: Checkpoints, meta: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Restore the newest checkpoint: the steps that it had finished and the rank's state; None without one."""
        found = checkpoints.resume(meta, replicated=True)
        if found is None:
            return None
        checkpoint, state = found
        if self.sharded:
            restore(self.engine, checkpoint.folder / "engine", ENGINE_TAG, checkpoint.world_size)
        else:
            self.module.load_state_dict(state.pop("module"))
            self.optimizer.load_state_dict(state.pop("optimizer"))
        return checkpoint.step, state

    def _write(self, folder: Path) -> None:
        # DeepSpeed's own "latest" file is not atomic, and not needed: our manifest decides.
        self.engine.save_checkpoint(str(folder / "engine"), tag=ENGINE_TAG, save_latest=False)


def linear_rate(step: int, total: int, stage: OptimizerConfig) -> float:
    """Linear warm-up to ``stage.lr``, then linear decay to 0 after ``total`` steps; a pure function of the step.

    The warm-up takes a fifth of the steps at most: few users make short stages, which would never reach their rate.
    """
    warmup = min(stage.warmup_steps, total // 5)
    if step < warmup:
        return stage.lr * (step + 1) / warmup
    return stage.lr * max(0.0, (total - step) / max(1, total - warmup))


def mean_over_ranks(values: Sequence[float | Tensor], device: torch.device) -> list[float]:
    """The means over ranks, the same on every rank."""
    total = torch.stack([torch.as_tensor(value, dtype=torch.float64).to(device) for value in values])
    ranks = Ranks.current()
    if ranks.size > 1:
        torch.distributed.all_reduce(total)
    return (total / ranks.size).tolist()
