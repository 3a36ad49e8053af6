"""The real vLLM: what it computes is what transformers computes, before and after a change of weights."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm.config import EngineConfig, LMRecConfig
from llm.engine import BATCHED_TOKENS_ON_CPU, Engine, adapted, check_adaptable, check_model
from llm.knowledge import fingerprint
from llm.lmrec import build_lmrec
from llm.tokenizer import load_tokenizer, train_tokenizer
from rec.runtime.errors import UserError

TOKENS = list(range(5, 29))


def make_model(folder: Path, seed: int) -> Path:
    tokenizer = train_tokenizer(["some words to learn", "and other words"], 320, 64)
    torch.manual_seed(seed)
    model = build_lmrec(LMRecConfig(dim=64, heads=2, layers=2, context=64), len(tokenizer), tokenizer.eos_token_id)
    # Spread out, so that a wrong weight shows.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reference(model: Path | torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model).eval()
    ids = torch.tensor([tokens])
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> tuple[Engine, Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    first, second = make_model(folder / "a", 1), make_model(folder / "b", 2)
    return Engine(first, EngineConfig(), max_length=64), first, second


@pytest.mark.vllm
def test_engine_and_transformers_agree_through_changes_of_weights(engine):
    """The output head is tied: a plain reload would leave vLLM's packed copy of it at the old weights."""
    vllm, first, second = engine
    for version, folder in enumerate((first, second, first)):
        vllm.load_weights(folder, f"v{version}")
        found = torch.tensor(vllm.logprobs_of(TOKENS))
        torch.testing.assert_close(found, reference(folder, TOKENS), rtol=0, atol=1e-3)


@pytest.mark.vllm
def test_the_prefix_cache_never_survives_a_change_of_weights(engine):
    vllm, first, second = engine
    vllm.load_weights(first, "x")
    long = TOKENS * 2
    vllm.logprobs_of(long)
    [before] = vllm.generate([long], [1], 8, temperature=0)
    vllm.load_weights(second, "y")
    [after] = vllm.generate([long], [1], 8, temperature=0)
    expected = reference(second, long + after.token_ids)[-len(after.token_ids) :]
    torch.testing.assert_close(torch.tensor(after.logprobs), expected, rtol=0, atol=1e-3)
    assert after.token_ids != before.token_ids


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
    engine = Engine(base, EngineConfig(), max_length=64, lora_rank=4)
    torch.testing.assert_close(torch.tensor(engine.logprobs_of(TOKENS)), reference(base, TOKENS), rtol=0, atol=1e-3)
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
    assert not torch.allclose(reference(peft, TOKENS), reference(base, TOKENS), atol=0.1)


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
def test_models_whose_adapters_vllm_cannot_read_are_refused_by_name(llama, engine):
    check_adaptable(llama[0])
    with pytest.raises(UserError, match="reads no adapters of GPT2LMHeadModel"):
        check_adaptable(engine[1])


@pytest.mark.vllm
def test_sampling_logprobs_are_those_of_the_distribution_sampled_from(engine):
    vllm, first, _ = engine
    vllm.load_weights(first, "z")
    prompts = [TOKENS[:3], TOKENS[4:9], TOKENS]
    completions = vllm.generate(prompts, [11, 12, 13], 10)
    for prompt, completion in zip(prompts, completions, strict=True):
        assert 1 <= len(completion.token_ids) <= 10
        assert len(completion.logprobs) == len(completion.token_ids)
        expected = reference(first, prompt + completion.token_ids)[-len(completion.token_ids) :]
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-3)


@pytest.mark.vllm
def test_a_seed_decides_a_text_whoever_is_in_the_batch(engine):
    vllm, _, _ = engine
    [alone] = vllm.generate([TOKENS[:4]], [7], 10)
    together = vllm.generate([TOKENS[:4], TOKENS[:4], TOKENS[5:9]], [8, 7, 9], 10)
    assert together[1].token_ids == alone.token_ids
    assert together[0].token_ids != alone.token_ids


def test_heads_too_small_for_vllm_on_cpu_are_refused_at_once(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU runs them")
    build_lmrec(LMRecConfig(dim=32, heads=4, layers=1, context=16), 300, 0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="attention heads of 8; vLLM on CPU needs at least 32"):
        check_model(tmp_path)


def test_prompts_longer_than_the_model_reads_are_refused_at_once(tmp_path):
    build_lmrec(LMRecConfig(dim=64, heads=2, layers=1, context=16), 300, 0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"need 17 tokens, .* reads 16"):
        check_model(tmp_path, 17)


def test_a_folder_that_is_no_model_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="is no language model") as caught:
        check_model(tmp_path / "nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"has no usable tokenizer|is no language model"):
        load_tokenizer(tmp_path)


@pytest.mark.vllm
def test_more_prompts_than_one_step_reads(engine):
    """vLLM would read one of them in two steps, and on a CPU die of its seed."""
    vllm, first, _ = engine
    vllm.load_weights(first, "many")
    prompts = [TOKENS * 2 + [5 + number % 20] for number in range(200)]
    assert sum(map(len, prompts)) > 2 * BATCHED_TOKENS_ON_CPU
    together = vllm.generate(prompts, range(200), 4)
    [alone] = vllm.generate(prompts[123:124], [123], 4)
    assert together[123].token_ids == alone.token_ids
