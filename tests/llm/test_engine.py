"""The real vLLM: what it computes is what transformers computes, before and after a change of weights."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llm.config import EngineConfig, LMRecConfig
from llm.engine import BATCHED_TOKENS_ON_CPU, HEAD_DIMS_ON_CPU, Engine, check_model
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


def reference(folder: Path, tokens: list[int]) -> torch.Tensor:
    model, ids = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.tensor([tokens])
    with torch.no_grad():
        return model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None]).squeeze(-1)


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Iterator[tuple[Engine, Path, Path]]:
    folder = tmp_path_factory.mktemp("models")
    first, second = make_model(folder / "a", 1), make_model(folder / "b", 2)
    with closing(Engine(first, EngineConfig(), max_length=64)) as engine:
        yield engine, first, second


@pytest.mark.vllm
def test_engine_and_transformers_agree_through_changes_of_weights(engine):
    """The output head is tied: a plain reload would leave vLLM's packed copy of it at the old weights."""
    vllm, first, second = engine
    for version, folder in enumerate((first, second, first)):
        vllm.load_weights(folder, f"v{version}")
        found = torch.tensor(vllm.logprobs_of(TOKENS))
        torch.testing.assert_close(found, reference(folder, TOKENS), rtol=0, atol=1e-3)


@pytest.mark.vllm
def test_weights_out_of_memory_are_those_out_of_a_folder(engine):
    vllm, first, second = engine
    for version, folder in enumerate((first, second)):
        vllm.load_weights(folder, f"v{version}")
        expected = vllm.logprobs_of(TOKENS)
        vllm.load_weights(second if folder == first else first, "other")
        vllm.load_tensors(load_file(folder / "model.safetensors"), f"again-{version}")
        assert vllm.version == f"again-{version}"
        assert vllm.logprobs_of(TOKENS) == expected


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
def test_a_text_is_what_vllm_itself_makes_of_the_tokens(engine):
    from vllm import SamplingParams

    vllm, first, _ = engine
    vllm.load_weights(first, "text")
    ours = vllm.generate([TOKENS] * 20, list(range(20)), 12)
    params = [SamplingParams(temperature=1.0, max_tokens=12, logprobs=0, seed=seed) for seed in range(20)]
    theirs = [one.outputs[0] for one in vllm.llm.generate(vllm._salted([TOKENS] * 20), params, use_tqdm=False)]
    assert [one.token_ids for one in ours] == [list(one.token_ids) for one in theirs]
    assert [one.text for one in ours] == [one.text.rstrip("\ufffd") for one in theirs]
    for own, other in zip(ours, theirs, strict=True):
        by_token = zip(other.token_ids, other.logprobs, strict=True)
        assert own.logprobs == [entry[token].logprob for token, entry in by_token]


@pytest.mark.vllm
def test_a_seed_decides_a_text_whoever_is_in_the_batch(engine):
    vllm, _, _ = engine
    [alone] = vllm.generate([TOKENS[:4]], [7], 10)
    together = vllm.generate([TOKENS[:4], TOKENS[:4], TOKENS[5:9]], [8, 7, 9], 10)
    assert together[1].token_ids == alone.token_ids
    assert together[0].token_ids != alone.token_ids


@pytest.mark.vllm
def test_the_sizes_of_heads_are_those_that_vllm_computes_on_a_cpu():
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert CPUAttentionBackend.get_supported_head_sizes() == list(HEAD_DIMS_ON_CPU)


def test_heads_too_small_for_vllm_on_cpu_are_refused_at_once(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU runs them")
    build_lmrec(LMRecConfig(dim=32, heads=4, layers=1, context=16), 300, 0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="attention heads of 8; vLLM on CPU needs one of 32, 64, "):
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
