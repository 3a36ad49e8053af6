"""Bytes of GPU memory that an alignment job needs, by arithmetic on the model's shape; no weight is loaded."""

from dataclasses import dataclass

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from align.config import MainJob, TrainerConfig
from align.policy import deepspeed_config
from llm.lmrec import build_lmrec
from rec.runtime.errors import UserError

FP32, BF16 = 4, 2
# Adam under ZeRO: the float32 copy of the weight and its two moments, whatever the weights are computed in.
OPTIMIZER_BYTES = 3 * FP32
# What one token leaves behind in one block for the backward pass, in values of the hidden size: inputs of the layers,
# of the norms and of the activation, with attention that keeps no matrix (Korthikanti et al. 2022, Eq. 2: 34 bytes in
# half precision, the masks of dropouts, which alignment has none of, left out).
VALUES_A_BLOCK = 16
# CUDA context, NCCL, allocator: seen on any process before it holds anything of ours.
OVERHEAD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Shape:
    """The LLM of a job, and the texts of one step.

    Attributes:
        parameters: of the model.
        trainable: those that are trained: all of them, or the adapters'.
        blocks: transformer blocks.
        hidden: size of the hidden state.
        vocabulary: of the logits.
        kv_values: of one token in one block's cache: 2 x heads that keys and values have x their size.
        texts_per_step: drawn for one trainer step, over all ranks.
        prompt_tokens: of a prompt, at most.
        new_tokens: of a text, at most.
    """

    parameters: int
    trainable: int
    blocks: int
    hidden: int
    vocabulary: int
    kv_values: int
    texts_per_step: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens_per_step(self) -> int:
        """Prompts and texts that one step computes gradients of, over all ranks."""
        return self.texts_per_step * (self.prompt_tokens + self.new_tokens)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by what they are for."""

    parts: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def shape_of(job: MainJob, prompt_tokens: int = 64) -> Shape:
    """The shape of a job's LLM, read from its configuration.

    Args:
        job: the recipe.
        prompt_tokens: of the longest prompt, which only the data could tell.

    Raises:
        UserError: if the LLM's configuration cannot be had here.
    """
    model = _empty(job)
    config, lora = model.config, job.align.trainer.lora
    parameters = sum(parameter.numel() for parameter in model.parameters())
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    adapters = 0
    if lora is not None:
        linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        adapters = sum(lora.rank * (one.in_features + one.out_features) for one in linear[:-1])
    # As many of a step's samples reward as fit it, and only those that reward are drawn several times.
    align = job.align
    both = align.trainer.batch_size * align.objective.samples + (align.trainer.batch_size if align.reward_users else 0)
    fresh = align.fresh_items if align.fresh != "all" else job.rec.model.max_length
    return Shape(
        parameters=parameters,
        trainable=adapters or parameters,
        blocks=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        kv_values=2 * kv_heads * size,
        texts_per_step=both * fresh,
        prompt_tokens=prompt_tokens,
        new_tokens=job.llm.knowledge.max_new_tokens,
    )


def trainer_memory(trainer: TrainerConfig, shape: Shape, ranks: int) -> Memory:
    """One trainer rank's GPU, under the recipe's ZeRO stage, on ``ranks`` ranks."""
    width, stage, host = BF16 if trainer.bf16 else FP32, trainer.zero_stage, trainer.offload
    weights, trained = shape.parameters * width, shape.trainable * width
    zero = deepspeed_config(trainer)["zero_optimization"]
    buckets = sum(zero.get(key, 0) for key in ("reduce_bucket_size", "allgather_bucket_size"))
    buckets += zero.get("stage3_prefetch_bucket_size", 0)
    reference = 0 if trainer.lora is not None else weights
    share = ranks if stage == 3 else 1
    rows = shape.texts_per_step / ranks
    tokens = rows * (shape.prompt_tokens + shape.new_tokens)
    # A policy's logits in its own precision and in float32, their gradient, and the reference's.
    logits = rows * shape.new_tokens * shape.vocabulary * (2 * width + 2 * FP32)
    return Memory(
        {
            "weights": 0 if host else weights / share,
            "gradients": 0 if host else trained / (ranks if stage >= 2 else 1),
            "optimizer": 0 if host else OPTIMIZER_BYTES * shape.trainable / ranks,
            "reference": 0 if host else reference / share,
            "buckets": min(buckets, 2 * shape.parameters) * width,
            "activations": tokens * shape.blocks * shape.hidden * VALUES_A_BLOCK * width + logits,
            "overhead": OVERHEAD_BYTES,
        }
    )


def host_memory(trainer: TrainerConfig, shape: Shape, ranks: int, ranks_per_node: int) -> float:
    """Bytes of one node's memory that offloading takes; 0 without it."""
    if not trainer.offload:
        return 0.0
    width = BF16 if trainer.bf16 else FP32
    states = shape.parameters * width * 2 + shape.trainable * (width + OPTIMIZER_BYTES)
    return states / ranks * ranks_per_node


def generator_memory(job: MainJob, shape: Shape, gpu_bytes: float) -> Memory:
    """A generator's GPU: vLLM takes its share of it, and what the weights leave of that is the KV cache.

    Raises:
        UserError: if the weights do not fit into that share.
    """
    width = FP32 if job.llm.engine.dtype == "float32" else BF16
    share = job.llm.engine.gpu_memory_utilization * gpu_bytes
    weights = shape.parameters * width
    if weights >= share:
        raise UserError(
            f"vLLM's share of {share / 1e9:.1f} GB does not hold the LLM's {weights / 1e9:.1f} GB: raise"
            " llm.engine.gpu_memory_utilization, or take larger GPUs"
        )
    return Memory({"weights": weights, "KV cache": share - weights})


def cached_tokens(memory: Memory, job: MainJob, shape: Shape) -> int:
    """How many tokens that cache holds: prompts and texts of all that vLLM draws at once."""
    width = FP32 if job.llm.engine.dtype == "float32" else BF16
    return int(memory.parts["KV cache"] / (shape.blocks * shape.kv_values * width))


def _empty(job: MainJob) -> PreTrainedModel:
    """The LLM without weights."""
    with torch.device("meta"):
        if job.llm.model is None:
            return build_lmrec(job.llm.lmrec, job.llm.lmrec.vocabulary, 0)
        try:
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job.llm.model))
        except (OSError, ValueError) as error:
            raise UserError(
                f"the configuration of {job.llm.model} cannot be read ({str(error).strip().splitlines()[0]}): a folder"
                " with its config.json is enough"
            ) from error
