"""Prompts, tokenizer, corpus, text encoder."""

import copy

import pyarrow as pa
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import RobertaConfig, RobertaModel

from llm.config import EncoderConfig, LMRecConfig
from llm.corpus import IGNORED, HistoryCorpus, KnowledgeCorpus, PaddedBatches
from llm.lmrec import build_lmrec
from llm.prompts import NO_TEXT, TEMPLATES, item_texts, prompt_tokens
from llm.text_encoder import NO_TOKEN, TextEncoder
from llm.text_items import CatalogTexts
from llm.tokenizer import ARROW, load_tokenizer, token_ids, train_tokenizer
from rec.runtime.errors import UserError

TEXTS = ["Toy Story (1995)", "Lumière and Company", "GoldenEye → 007", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400, 64)


def test_item_texts_leave_no_debris_of_missing_fields():
    items = pa.table({"t": ["A", "B", "C", ""], "y": ["1995", "", "1996", ""], "g": ["x y", "z", "", ""]})
    assert item_texts(items, "{t} ({y}), {g}") == ["A (1995), x y", "B, z", "C (1996)", NO_TEXT]
    assert item_texts(items, "{t}, {y}, {g}") == ["A, 1995, x y", "B, z", "C, 1996", NO_TEXT]
    assert item_texts(items, "{t} - {y} | {g}") == ["A - 1995 | x y", "B - z", "C - 1996", NO_TEXT]


def test_an_unknown_field_names_the_fields_there_are():
    with pytest.raises(UserError, match=r"'tilte', the prepared items have: item_id, title"):
        item_texts(pa.table({"item_id": ["1"], "title": ["A"]}), "{tilte}")


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ["Toy Story (1995)", "été 日本 🎬", "tab\tnew\nline"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_texts_longer_than_the_context_are_whole_and_nobody_is_warned(tokenizer, caplog):
    tokenizer.deprecation_warnings.clear()  # transformers warns once
    [ids] = token_ids(tokenizer, ["Toy Story " * 50])
    assert len(ids) > tokenizer.model_max_length
    assert tokenizer.decode(ids) == "Toy Story " * 50
    assert not caplog.records


def test_the_arrow_is_one_token_and_items_do_not_depend_on_neighbours(tokenizer):
    joined = tokenizer(f"Toy Story (1995) {ARROW} Lumière and Company")["input_ids"]
    arrow = tokenizer.convert_tokens_to_ids(ARROW)
    first, second = tokenizer("Toy Story (1995)")["input_ids"], tokenizer(" Lumière and Company")["input_ids"]
    assert joined == [*first, arrow, *second]


def test_prompts_use_the_chat_template_when_there_is_one(tokenizer):
    plain = prompt_tokens(["Toy Story"], "{item} →", tokenizer)
    assert tokenizer.decode(plain[0]) == "Toy Story→"
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %} [assistant]"
    try:
        chat = prompt_tokens(["Toy Story"], "movies", tokenizer)
    finally:
        tokenizer.chat_template = None
    assert tokenizer.decode(chat[0]) == f"[user] {TEMPLATES['movies'].replace('{item}', 'Toy Story')} [assistant]"


@pytest.mark.parametrize("domain", sorted(TEMPLATES))
def test_every_domain_asks_what_the_item_is_and_whom_it_attracts(tokenizer, domain):
    [prompt] = prompt_tokens(["Dune"], domain, tokenizer)
    asked = tokenizer.decode(prompt)
    assert "Dune" in asked
    assert "Describe" in asked
    assert "then say which" in asked


def test_a_prompt_without_the_item_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"has no \{item\}"):
        prompt_tokens(["A"], "Describe it.", tokenizer)


def test_the_corpus_is_the_training_histories_and_nothing_else(small_data):
    texts = item_texts(small_data.items, "{title}")
    tokenizer = train_tokenizer(texts, 400, 48)
    corpus = HistoryCorpus(small_data, texts, tokenizer, 48)
    for epoch in (0, 1):
        rows = corpus.rows(seed=3, epoch=epoch)
        assert max(len(row.ids) for row in rows) <= 48
        assert not any(row.given for row in rows)
        told = " ".join(tokenizer.decode(row.ids).replace(ARROW, f" {ARROW}") for row in rows)
        histories = [text.strip() for text in told.split(tokenizer.eos_token) if text.strip()]
        assert len(histories) == small_data.n_users
        for user, history in enumerate(histories):
            begin, end = small_data.offsets[user], small_data.train_ends[user]
            expected = [texts[item - 1] for item in small_data.sequence[begin:end].tolist()]
            # A cut between rows shows as a missing arrow, nothing is lost or repeated.
            assert " ".join(history.replace(ARROW, " ").split()) == " ".join(expected)


def test_corpus_batches_depend_on_seed_and_epoch_alone(small_data):
    texts = item_texts(small_data.items, "{title}")
    tokenizer = train_tokenizer(texts, 400, 48)
    corpus = HistoryCorpus(small_data, texts, tokenizer, 48)
    again = HistoryCorpus(small_data, texts, tokenizer, 48)
    batches = PaddedBatches(corpus, seed=1, epochs=3, batch_size=16)
    # The other one begins in the middle of an epoch, as a resumed run does.
    second = PaddedBatches(again, seed=1, epochs=3, batch_size=16)
    for step in range(batches.steps // 2, batches.steps):
        [one], [other] = batches.parts(step), second.parts(step)
        ids, labels = one.ids, one.labels
        assert torch.equal(ids, other.ids)
        assert torch.equal(labels, other.labels)
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])


def test_every_text_follows_its_prompt_which_is_given_and_not_learnt(tokenizer):
    prompts = prompt_tokens(["Toy Story", "Lumière", "GoldenEye"], "{item} →", tokenizer)
    texts = [["made of plastic", "for children"], [], ["a spy"]]
    corpus = KnowledgeCorpus(prompts, texts, tokenizer, 64)
    told = []
    batches = PaddedBatches(corpus, seed=0, epochs=1, batch_size=2)
    for step in range(batches.steps):
        [batch] = batches.parts(step)
        for row, label in zip(batch.ids, batch.labels, strict=True):
            learnt = label != IGNORED
            assert torch.equal(row[learnt], label[learnt])
            begin = int(learnt.nonzero()[0])
            assert row[:begin].tolist() in prompts
            told.append((tokenizer.decode(row[:begin]), tokenizer.decode(row[learnt])))
    end = tokenizer.eos_token
    assert sorted(told) == [
        ("GoldenEye→", f" a spy{end}"),
        ("Toy Story→", f" for children{end}"),
        ("Toy Story→", f" made of plastic{end}"),
    ]


def test_a_text_that_is_too_long_is_cut_and_does_not_end(tokenizer):
    prompts = prompt_tokens(["Toy Story"], "{item} →", tokenizer)
    [row] = KnowledgeCorpus(prompts, [["so long a text that it does not fit"]], tokenizer, 12).rows(0, 0)
    assert len(row.ids) == 12
    assert row.ids[-1] != tokenizer.eos_token_id


def test_an_encoder_ignores_padding_and_order_and_maps_no_text_to_zero(tmp_path, tokenizer):
    torch.manual_seed(0)
    build_lmrec(LMRecConfig(dim=32, heads=2, layers=1, context=64), len(tokenizer), 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encode = TextEncoder(tmp_path, EncoderConfig(batch_size=2))
    together = encode(TEXTS)
    assert together.shape == (4, 32)
    assert not together[3].any()
    for text, vector in zip(TEXTS, together, strict=True):
        torch.testing.assert_close(encode([text])[0], vector, rtol=1e-4, atol=1e-4)
    assert encode([]).shape == (0, 32)


def test_no_text_is_zeros_with_a_tokenizer_that_puts_its_own_tokens_around_every_text(tmp_path, tokenizer):
    build_lmrec(LMRecConfig(dim=32, heads=2, layers=1, context=64), len(tokenizer), 0).save_pretrained(tmp_path)
    around = copy.deepcopy(tokenizer)
    end = (around.eos_token, around.eos_token_id)
    around.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end[0]} $A {end[0]}", special_tokens=[end])
    around.save_pretrained(tmp_path)
    encode = TextEncoder(tmp_path, EncoderConfig())
    tokens = encode.tokens(["Toy Story", ""])
    assert tokens[0, 0] == tokens[0, -1] == end[1]
    assert (tokens[1] == NO_TOKEN).all()
    vectors = encode(["Toy Story", ""])
    assert vectors[0].any()
    assert not vectors[1].any()
    # Nor does it count for the mean that entries are standardised by.
    items, told = (CatalogTexts(texts, encode).items(len(texts), 8, standardise=True)
                   for texts in (["Toy Story", "", "GoldenEye"], ["Toy Story", "GoldenEye"]))  # fmt: skip
    torch.testing.assert_close(items.mean, told.mean)
    torch.testing.assert_close(items.deviation, told.deviation)


def test_a_text_is_cut_at_what_the_tokenizer_says_where_positions_are_counted_from_the_padding(tmp_path, tokenizer):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaModel(RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=18, **sizes)).save_pretrained(
        tmp_path
    )
    short = copy.deepcopy(tokenizer)
    short.model_max_length = 16
    short.save_pretrained(tmp_path)
    encode = TextEncoder(tmp_path, EncoderConfig())
    long = "Toy Story " * 20
    assert encode.tokens([long]).shape == (1, 16)
    assert encode([long]).any()


def test_a_model_folder_without_tokenizer_is_one_clear_line(tmp_path):
    build_lmrec(LMRecConfig(dim=32, heads=1, layers=1, context=16), 300, 0).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no usable tokenizer") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
