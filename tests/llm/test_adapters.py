"""Adapters in the real vLLM: what it computes is what peft computes, whichever came before.

In a file of its own, for two engines of one process do not live beside each other.
"""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm.config import EngineConfig, LMRecConfig
from llm.engine import Engine, adapted, check_adaptable
from llm.fingerprint import fingerprint
from llm.lmrec import build_lmrec
from llm.tokenizer import train_tokenizer
from rec.runtime.errors import UserError

TOKENS = list(range(5, 29))


def reference(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model.eval()(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A model of an architecture that vLLM can adapt, and two adapters."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = train_tokenizer(["some words to learn", "and other words"], 320, 64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    adapters = []
    for seed in (1, 2):
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        adapted_model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
        torch.manual_seed(seed)
        for name, parameter in adapted_model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        adapted_model.save_pretrained(folder / f"adapter-{seed}")
        tokenizer.save_pretrained(folder / f"adapter-{seed}")
        adapters.append(folder / f"adapter-{seed}")
    return folder / "base", adapters


@pytest.mark.vllm
def test_adapters_come_and_go_and_nothing_of_an_old_one_is_left(llama):
    base, adapters = llama
    original = reference(AutoModelForCausalLM.from_pretrained(base), TOKENS)
    with closing(Engine(base, EngineConfig(), max_length=64, lora_rank=4)) as engine:
        torch.testing.assert_close(
            torch.tensor(engine.logprobs_of(TOKENS)),
            original,
            rtol=0,
            atol=1e-3,
        )
        for version, adapter in enumerate([*adapters, adapters[0], *adapters]):
            engine.load_weights(adapter, f"v{version}")
            peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
            [text] = engine.generate([TOKENS[:9]], [7], 8)
            for tokens, found in (
                (TOKENS, engine.logprobs_of(TOKENS)),
                (TOKENS[:9] + text.token_ids, [*engine.logprobs_of(TOKENS[:9]), *text.logprobs]),
            ):
                torch.testing.assert_close(torch.tensor(found), reference(peft, tokens), rtol=0, atol=1e-3)
            assert engine.llm.llm_engine.list_loras() == {version + 1}
    assert not torch.allclose(reference(peft, TOKENS), original, atol=0.1)
    assert not dist.is_initialized()


def test_an_adapter_has_the_fingerprint_of_itself_and_of_its_model(llama):
    base, adapters = llama
    found = {fingerprint(folder) for folder in (base, *adapters)}
    assert len(found) == 3
    settings = json.loads((adapters[0] / "adapter_config.json").read_text())
    settings["target_modules"] = sorted(settings["target_modules"], reverse=True)  # peft writes them in any order
    (adapters[0] / "adapter_config.json").write_text(json.dumps(settings))
    assert fingerprint(adapters[0]) in found
    assert adapted(adapters[0]) == str(base)


@pytest.mark.vllm
def test_models_whose_adapters_vllm_cannot_read_are_refused_by_name(llama, tmp_path):
    check_adaptable(llama[0])
    build_lmrec(LMRecConfig(dim=64, heads=2, layers=1, context=64), 40, 1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="reads no adapters of GPT2LMHeadModel"):
        check_adaptable(tmp_path)
