"""vLLM behind four calls: generate, load weights, score a fixed text, tell the version. No other file imports vllm.

Invariants:
- One call of ``generate`` runs under one set of weights: weights change between calls only.
- Nothing computed under old weights is ever reused: the prefix cache is reset with the weights (and the reset is
  checked, vLLM only returns False), and every prompt carries the version as cache salt.
"""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from llm.config import EngineConfig
from rec.runtime import files
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)

HEAD_DIMS_ON_CPU = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # of vLLM's CPU attention
BATCHED_TOKENS_ON_CPU = 4096
ADAPTER = "adapter_config.json"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


@dataclass(frozen=True)
class Completion:
    """One generated text.

    Attributes:
        token_ids: generated tokens, the end-of-sequence token included if there is one.
        logprobs: log p of each of them when it was drawn, in nats.
        text: the tokens as text, without special tokens.
        cut: whether it was not at its end when it had as many tokens as it may.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    cut: bool


class Engine:
    """A vLLM engine in this process.

    Args:
        model: folder or hub name of a causal LM with its tokenizer.
        config: precision and memory.
        max_length: prompt and completion together, in tokens.
        seed: of the engine; requests carry seeds of their own.
        lora_rank: largest rank of adapters that ``load_weights`` will bring; 0 if it will bring whole models.

    Raises:
        UserError: if vLLM cannot run this model here.
    """

    def __init__(
        self, model: str | Path, config: EngineConfig, max_length: int, seed: int = 0, lora_rank: int = 0
    ) -> None:
        check_model(model, max_length)
        # In this process, so that the engine dies with it and no second one has to be watched.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(config.kv_cache_gib))
        from vllm import LLM

        on_gpu, reading, adapters = torch.cuda.is_available(), {}, {}
        if lora_rank:
            # Two, so that a new adapter can be there before the old one goes.
            adapters = {"enable_lora": True, "max_loras": 2, "max_lora_rank": min(r for r in RANKS if r >= lora_rank)}
        if not on_gpu:
            from torch import _dynamo

            # vLLM compiles a tiny log-prob kernel even when told to run eagerly: 17 s for nothing.
            _dynamo.config.disable = True
            # A prompt that is read in two steps makes vLLM turn its request's random generator back; a CPU's cannot.
            tokens = max(BATCHED_TOKENS_ON_CPU, max_length)
            reading = {"enable_chunked_prefill": False, "max_num_batched_tokens": tokens}
        self.llm = LLM(
            model=str(model),
            dtype=config.dtype,
            max_model_len=max_length,
            max_num_seqs=config.max_num_seqs,
            seed=seed % 2**31,
            enforce_eager=not on_gpu,
            gpu_memory_utilization=config.gpu_memory_utilization if on_gpu else 0.5,
            # The temperature belongs to the distribution that is sampled from, so to its log-probs too.
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            **reading,
            **adapters,
        )
        self.version, self.adapter = "initial", None

    def generate(
        self,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float = 1.0,
    ) -> list[Completion]:
        """Sample one completion a prompt, without top-p or top-k; the same seed gives the same text.

        Args:
            prompts: token ids.
            seeds: one a prompt.
            max_new_tokens: of each completion.
            temperature: 0 takes the most probable token each time.
        """
        from vllm import SamplingParams

        # Else vLLM makes text of tokens one by one, and objects of log-probs: a sixth of the time of short texts.
        lean = {"detokenize": False, "flat_logprobs": True}
        params = [
            SamplingParams(temperature=temperature, max_tokens=max_new_tokens, logprobs=0, seed=seed % 2**63, **lean)
            for seed in seeds
        ]
        outputs = self.llm.generate(self._salted(prompts), params, use_tqdm=False, lora_request=self.adapter)
        drawn = [output.outputs[0] for output in outputs]
        tokens = [list(one.token_ids) for one in drawn]
        texts = self.llm.get_tokenizer().batch_decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return [self._completion(*each) for each in zip(drawn, tokens, texts, strict=True)]

    def offline_rate(self, prompts: Sequence[list[int]], max_new_tokens: int) -> float:
        """Tokens a second of vLLM alone: no seeds, no log-probs, one call for all prompts, timed the second time."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=max_new_tokens)
        for _ in range(2):
            self.llm.reset_prefix_cache()
            begin = time.monotonic()
            outputs = self.llm.generate(self._salted(prompts), params, use_tqdm=False)
            seconds = time.monotonic() - begin
        return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds

    def logprobs_of(self, token_ids: list[int]) -> list[float]:
        """log p of every token of a fixed text given those before it, from the second on."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=1.0, max_tokens=1, prompt_logprobs=0)
        [output] = self.llm.generate(self._salted([token_ids]), params, use_tqdm=False, lora_request=self.adapter)
        scored = zip(token_ids[1:], output.prompt_logprobs[1:], strict=True)
        return [entry[token].logprob for token, entry in scored]

    def load_weights(self, folder: Path, version: str) -> None:
        """Replace the weights by those in ``folder``: a complete model of the same architecture, or an adapter.

        The caller checks the folder first: vLLM accepts one with a missing tensor, and a failed reload leaves an
        engine that dies at its next request.
        """
        if (folder / ADAPTER).exists():
            self._load_adapter(folder, version)
        else:
            self._reload(weights_path=str(folder))
        self._have_changed(version)

    def load_tensors(self, weights: Mapping[str, Tensor], version: str) -> None:
        """Replace the weights by all those of a model of the same architecture, by the names that its files have."""
        self._reload(weights_iterator=iter(weights.items()))
        self._have_changed(version)

    def close(self) -> None:
        """Give back memory and vLLM's process group, which a training job in this process would take for its own."""
        from vllm.distributed import cleanup_dist_env_and_memory

        del self.llm
        cleanup_dist_env_and_memory()

    def _have_changed(self, version: str) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache after a change of weights")
        self.version = version

    def _load_adapter(self, folder: Path, version: str) -> None:
        """Always under a new name and number: by these, not by its file, vLLM knows an adapter and what it computed."""
        from vllm.lora.request import LoRARequest

        number = 1 if self.adapter is None else self.adapter.lora_int_id + 1
        new = LoRARequest(f"{version}-{number}", number, str(folder))
        if not self.llm.llm_engine.add_lora(new):
            raise RuntimeError(f"vLLM refused the adapter in {folder}")
        if self.adapter is not None:
            self.llm.llm_engine.remove_lora(self.adapter.lora_int_id)
        self.adapter = new

    def _reload(self, **source: Any) -> None:
        self.llm.collective_rpc("reload_weights", kwargs=source)
        if not torch.cuda.is_available():
            self.llm.collective_rpc(_repack_tied_heads)

    def _salted(self, prompts: Sequence[list[int]]) -> list[dict]:
        return [{"prompt_token_ids": list(prompt), "cache_salt": self.version} for prompt in prompts]

    @staticmethod
    def _completion(output, token_ids: list[int], text: str) -> Completion:
        # One entry a token, that of the token drawn.
        assert output.logprobs.token_ids == token_ids
        drawn = list(output.logprobs.logprobs)
        # A character that was cut in two is left out.
        return Completion(token_ids, drawn, text.rstrip("\ufffd"), output.finish_reason == "length")


def adapted(adapter: str | Path) -> str:
    """The model, folder or hub name, that the adapter in a folder was made for."""
    return files.read_json(Path(adapter) / ADAPTER)["base_model_name_or_path"]


def _repack_tied_heads(worker) -> None:
    """On CPU vLLM keeps a packed copy of the output head; a reload leaves a tied one at its old weights.

    Checkpoints with tied embeddings hold no head, so the reload finds "no weights" for it and keeps the copy.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in worker.get_model().modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def check_model(model: str | Path, max_length: int = 0) -> None:
    """Refuse early, in one line, what vLLM refuses late, in a hundred.

    Raises:
        UserError: if there is no such model, it cannot read ``max_length`` tokens, or its heads are of a size
            that vLLM on CPU cannot compute.
    """
    try:
        config = AutoConfig.from_pretrained(str(model))
    except (OSError, ValueError) as error:
        raise UserError(f"{model} is no language model: {str(error).strip().splitlines()[0]}") from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise UserError(
            f"the longest prompt and its answer need {max_length} tokens, {model} reads {positions}: shorten"
            " llm.item_text, llm.knowledge.prompt or llm.knowledge.max_new_tokens"
        )
    heads = getattr(config, "num_attention_heads", None)
    if heads:
        check_head_dim(str(model), getattr(config, "head_dim", None) or config.hidden_size // heads)


def check_adaptable(model: str | Path) -> None:
    """Refuse a model whose adapters vLLM cannot read.

    Raises:
        UserError: naming its architecture.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    [architecture, *_] = AutoConfig.from_pretrained(str(model)).architectures or ["unknown"]
    found = ModelRegistry.models.get(architecture)
    if found is None or not supports_lora(found.load_model_cls()):
        raise UserError(f"align.trainer.lora: vLLM reads no adapters of {architecture} ({model}); train all weights")


def check_head_dim(name: str, head_dim: int) -> None:
    """Refuse heads that vLLM's attention on CPU cannot compute.

    Raises:
        UserError: on a machine without a GPU, if they are of another size.
    """
    if not torch.cuda.is_available() and head_dim not in HEAD_DIMS_ON_CPU:
        raise UserError(
            f"{name} has attention heads of {head_dim}; vLLM on CPU needs one of"
            f" {', '.join(map(str, HEAD_DIMS_ON_CPU))}: use other heads or another width"
        )
