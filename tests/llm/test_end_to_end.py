"""Texts in one row without padding: each gives what it gives alone, forwards and backwards, in any architecture."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llm.end_to_end import EndToEnd, has_flash, logits_at, use_end_to_end

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = {**SIZES, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 40}
MODELS = {
    "GPT-2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=40, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, attn_pdrop=0)
    ),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED)),
    "Mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=None)),
}
LENGTHS = (7, 1, 20, 3, 3)


@pytest.fixture
def texts() -> list[list[int]]:
    torch.manual_seed(1)
    return [torch.randint(50, (length,)).tolist() for length in LENGTHS]


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("end_to_end", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_text_gives_what_it_gives_alone(name, end_to_end, texts):
    alone, model = model_of(name), model_of(name)
    assert use_end_to_end(model)
    if not end_to_end:
        model.set_attn_implementation("eager")
    places = torch.tensor([0, 3, 6, 7, 8, 20, 27, 28, 33])
    weight = torch.randn(len(places), 50)
    whole = torch.cat([alone(torch.tensor([text])).logits[0] for text in texts])[places]
    found = logits_at(model, EndToEnd.of(texts), places, end_to_end)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    (whole * weight).sum().backward()
    (found * weight).sum().backward()
    for (parameter, value), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(value.grad, other.grad, rtol=1e-3, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("end_to_end", [True, False])
def test_no_places_are_no_logits_and_no_gradient(texts, end_to_end):
    model = model_of("GPT-2")
    if end_to_end:
        use_end_to_end(model)
    found = logits_at(model, EndToEnd.of(texts), torch.zeros(0, dtype=torch.long), end_to_end)
    assert found.shape == (0, 50)
    found.sum().backward()
    assert not model.transformer.h[0].mlp.c_fc.weight.grad.any()


def test_attention_that_is_not_the_plain_one_is_left_alone():
    sliding = MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=4))
    capped = Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=8))
    for model in (sliding, capped):
        before = model.config._attn_implementation
        assert not use_end_to_end(model)
        assert model.config._attn_implementation == before


def test_flash_attention_is_taken_for_what_it_computes_alone(monkeypatch):
    monkeypatch.setattr("llm.end_to_end._VARLEN", print)
    for capability, there in (((7, 5), False), ((8, 0), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert has_flash(torch.bfloat16, 64) == has_flash(torch.float16, 256) == there
        for dtype, head_size in ((torch.float32, 64), (torch.bfloat16, 20), (torch.bfloat16, 264)):
            assert not has_flash(dtype, head_size)


@pytest.mark.gpu
def test_flash_attention_on_a_gpu_agrees(texts):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    alone, model = (model_of("Llama").to("cuda", torch.bfloat16) for _ in range(2))
    assert use_end_to_end(model)
    places = torch.arange(sum(LENGTHS), device="cuda")
    with torch.no_grad():
        found = logits_at(model, EndToEnd.of(texts, "cuda"), places)
        whole = torch.cat([alone(torch.tensor([text], device="cuda")).logits[0] for text in texts]).float()
    torch.testing.assert_close(found, whole, rtol=5e-2, atol=5e-2)
