"""LMRec on causal LMs and tokenizers that are not its own."""

import numpy as np
import pytest
import torch
from pretraining import job
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)

from llm.corpus import ItemTokens
from llm.lmrec_run import build_decoder, run
from llm.tokenizer import ARROW, load_tokenizer
from rec.runtime.errors import UserError


@pytest.mark.parametrize("unknown", ["<|unk|>", None])
def test_any_causal_lm_whose_tokenizer_has_no_arrow_of_its_own_is_trained_on(tmp_path, small_data, unknown):
    tokenizer = foreign_tokenizer(unknown)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, attention_dropout=0.1, **size)
    )
    llama.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    own = job(tmp_path, small_data, model=str(tmp_path / "llama"))
    assert build_decoder(own, tokenizer).config.attention_dropout == 0
    assert run(own, "test")["rows"][0]["HR@10"] > 0
    arrow = tokenizer(f" {ARROW}", add_special_tokens=False)["input_ids"]
    assert len(arrow) > 1
    tokens = ItemTokens(load_tokenizer(tmp_path / "llama"), ["one", "two", "three"], 40)
    ids, ends = tokens.joined(np.array([0, 1, 2]))
    assert ids == tokenizer(f"one {ARROW} two {ARROW} three")["input_ids"]
    assert ends == [
        len(tokenizer(text)["input_ids"]) for text in ("one", f"one {ARROW} two", f"one {ARROW} two {ARROW} three")
    ]
    assert tokens.length(np.array([0, 1, 2])) == len(ids)
    assert tokens.that_fit(np.array([0, 1, 2]), len(ids)).tolist() == [0, 1, 2]
    assert tokens.that_fit(np.array([0, 1, 2]), len(ids) - 1).tolist() == [1, 2]


def test_what_a_tokenizer_puts_around_a_text_is_around_a_history_and_not_its_items():
    tokenizer = foreign_tokenizer(None)
    begin, end = (("<|end|>", 0),) * 2
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin[0]} $A {end[0]}", special_tokens=[begin]
    )
    tokens = ItemTokens(tokenizer, ["one", "two", "three"], 40)
    ids, _ = tokens.joined(np.array([0, 1, 2]))
    assert ids == [0, *tokenizer(f"one {ARROW} two {ARROW} three", add_special_tokens=False)["input_ids"]]


NEO = {
    "hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
}  # fmt: skip
BLOOM = {"hidden_size": 32, "n_layer": 1, "n_head": 2}
MPT = {"d_model": 32, "n_layers": 1, "n_heads": 2}
ANOTHER_LOSS = "L1 would be another loss than its own"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda size: CohereForCausalLM(CohereConfig(**size, logit_scale=0.5)), ANOTHER_LOSS),
        (lambda size: PhiForCausalLM(PhiConfig(**size)), ANOTHER_LOSS),
        (lambda size: MistralForCausalLM(MistralConfig(**size, sliding_window=16)), "attends to all tokens before"),
        (lambda size: MistralForCausalLM(MistralConfig(**size, sliding_window=48)), None),
        (lambda size: GPTNeoForCausalLM(GPTNeoConfig(**NEO, vocab_size=size["vocab_size"])), "attends to all tokens"),
        (lambda size: BloomForCausalLM(BloomConfig(**BLOOM, vocab_size=size["vocab_size"])), "attends to all tokens"),
        (lambda size: MptForCausalLM(MptConfig(**MPT, vocab_size=size["vocab_size"])), "attends to all tokens"),
    ],
    ids=["a scale", "a bias", "a short window", "a window that is long enough", "GPT-Neo", "Bloom", "MPT"],
)
def test_a_model_whose_loss_or_attention_is_another_is_refused(tmp_path, small_data, make, message):
    tokenizer = foreign_tokenizer(None)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    size["num_key_value_heads"] = 2
    model = make({**size, "vocab_size": len(tokenizer), "max_position_embeddings": 64, "pad_token_id": 0})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    own = job(tmp_path, small_data, model=str(tmp_path / "model"))
    if message is None:
        build_decoder(own, tokenizer)
        return
    with pytest.raises(UserError, match=message):
        build_decoder(own, tokenizer)


def test_a_tokenizer_that_cannot_write_the_arrow_would_join_items_by_nothing():
    words = Tokenizer(models.WordLevel({"<|eos|>": 0, "one": 1, "two": 2}, unk_token="<|eos|>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|eos|>", unk_token="<|eos|>")
    with pytest.raises(UserError, match="cannot write '→', which joins items"):
        ItemTokens(tokenizer, ["one", "two"], 40)


def foreign_tokenizer(unknown: str | None) -> PreTrainedTokenizerFast:
    """A byte-level one that has never seen an arrow."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", *([unknown] if unknown else [])]
    own.train_from_iterator(
        ["one two three"], trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|end|>", unk_token=unknown)
