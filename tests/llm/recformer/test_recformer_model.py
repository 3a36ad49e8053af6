"""The model against independent ones: embeddings, attention, positions, saving, and which weights are tuned."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import save_bert
from torch.nn import functional as F
from transformers import (
    AlbertConfig,
    AlbertModel,
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from llm.recformer.batches import SequenceMaker, TokenBatch, pad
from llm.recformer.config import OptimizerConfig, RecformerSettings
from llm.recformer.mlm import MaskedLMHead
from llm.recformer.model import load_recformer, wrap
from llm.recformer.text import tokenise
from llm.recformer.tuning import choose_tuned
from rec.runtime.config import build
from rec.runtime.errors import UserError


def settings(folder: Path, **size: object) -> RecformerSettings:
    sizes = {"max_items": 6, "max_tokens": 48, "new_embedding_std": 0.3, **size}
    return build(RecformerSettings, {"backbone": str(folder), "size": sizes})


def make_batch(small_data, tokenizer, config: RecformerSettings, multiple: int = 1) -> TokenBatch:
    tokens = tokenise(small_data.items, ["title", "kind"], 32, tokenizer)
    maker = SequenceMaker(tokens, config.size, tokenizer.cls_token_id)
    sequences = maker([np.array([1, 2, 3]), np.array([4]), np.array([9, 8, 7, 6, 5])])
    return pad(sequences, np.arange(3), tokenizer.pad_token_id, multiple)


def test_the_input_is_the_sum_of_four_embeddings_under_one_layer_norm(bert, small_data):
    torch.manual_seed(1)
    config = settings(bert)
    model, tokenizer = load_recformer(config)
    batch = make_batch(small_data, tokenizer, config)
    own = model.eval().backbone.embeddings
    seen = []
    own.register_forward_hook(lambda module, inputs, output: seen.append(output))
    model(batch)
    for row, place in ((0, 0), (0, 7), (2, 13)):
        summed = (
            own.word_embeddings.weight[batch.ids[row, place]]
            + own.position_embeddings.weight[place]
            + own.token_type_embeddings.weight[0]  # BERT's own segments: one for all
            + model.token_types.weight[batch.types[row, place]]
            + model.item_positions.weight[batch.items[row, place]]
        )
        expected = F.layer_norm(summed, (32,), own.LayerNorm.weight, own.LayerNorm.bias, own.LayerNorm.eps)
        torch.testing.assert_close(seen[0][row, place], expected)


def test_without_new_embeddings_the_untuned_model_is_the_pretrained_one(bert, small_data):
    config = settings(bert, new_embedding_std=0)
    model, tokenizer = load_recformer(config)
    batch = make_batch(small_data, tokenizer, config)
    plain = AutoModel.from_pretrained(bert).eval()
    expected = plain(input_ids=batch.ids, attention_mask=batch.mask.long()).last_hidden_state
    torch.testing.assert_close(model.eval()(batch).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


def test_attention_is_trained_in_float32_under_bfloat16_and_is_the_same(bert, small_data, monkeypatch):
    seen, plain = [], F.scaled_dot_product_attention

    def attention(q, *inputs, **options):
        seen.append(q.dtype)
        return plain(q, *inputs, **options)

    model, tokenizer = load_recformer(settings(bert))
    batch = make_batch(small_data, tokenizer, settings(bert))
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    with torch.autocast("cpu", torch.bfloat16):
        trained = model.vectors(batch)
        with torch.no_grad():
            read = model.vectors(batch)
    assert seen == [torch.float32] * 3 + [torch.bfloat16] * 3
    torch.testing.assert_close(trained, read, rtol=0.05, atol=0.05)
    trained.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(model.vectors(batch), trained, rtol=0.05, atol=0.05)


def test_dropout_is_the_cheap_one_and_attentions_is_a_choice(bert, longformer, small_data, tmp_path):
    own = save_bert(tmp_path / "dropping", dropout=0.2)
    for folder in (own, longformer):
        model, _ = load_recformer(settings(folder))
        assert not any(isinstance(module, torch.nn.Dropout) for module in model.modules())
    model, tokenizer = load_recformer(settings(own))
    hidden, attention = model.backbone.embeddings.dropout, model.layers[0].attention.self.dropout
    assert (hidden.p, attention.p) == (0.2, 0.0)
    batch = make_batch(small_data, tokenizer, settings(own))
    assert not torch.equal(model.train().vectors(batch), model.eval().vectors(batch))
    # A saved one is what the next stage's recipe says, not what the last one's said.
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    for folder, asked, expected in ((own, None, 0.2), (own, 0.3, 0.3), (tmp_path / "saved", 0.3, 0.3)):
        changed = settings(folder).model_copy(update={"attention_dropout": asked})
        assert load_recformer(changed)[0].layers[0].attention.self.dropout.p == expected


def test_padding_and_neighbours_change_nothing(bert, longformer, small_data):
    for folder in (bert, longformer):
        config = settings(folder, attention_window=4)
        model, tokenizer = load_recformer(config)
        model.eval()
        batch = make_batch(small_data, tokenizer, config, model.length_multiple)
        together = model.vectors(batch)
        for row in range(3):
            length = -(-int(batch.mask[row].sum()) // model.length_multiple) * model.length_multiple
            alone = [getattr(batch, name)[row : row + 1, :length] for name in ("ids", "types", "items", "mask")]
            vector = model.vectors(TokenBatch(batch.rows[row : row + 1], *alone))[0]
            torch.testing.assert_close(vector, together[row], rtol=1e-4, atol=1e-5)


def roberta_of(model) -> RobertaModel:
    """A RoBERTa, which attends to everything, with a Longformer's weights."""
    config = RobertaConfig.from_dict({**model.backbone.config.to_dict(), "attn_implementation": "eager"})
    plain = RobertaModel(config, add_pooling_layer=False)
    weights = {name: value for name, value in model.backbone.state_dict().items() if "_global" not in name}
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not missing
    return plain.eval()


def inputs_of(model, batch: TokenBatch) -> torch.Tensor:
    words = model.backbone.get_input_embeddings()(batch.ids)
    return words + model.token_types(batch.types) + model.item_positions(batch.items)


def test_a_longformer_with_a_window_as_long_as_the_sequence_is_full_attention(longformer, small_data):
    config = settings(longformer, attention_window=64)
    model, tokenizer = load_recformer(config)
    model.eval()
    for layer in model.layers:  # [CLS] has projections of its own; full attention has one kind
        attention = layer.attention.self
        for name in ("query", "key", "value"):
            getattr(attention, f"{name}_global").load_state_dict(getattr(attention, name).state_dict())
    batch = make_batch(small_data, tokenizer, config, model.length_multiple)
    found = model(batch).last_hidden_state[batch.mask]
    expected = roberta_of(model)(inputs_embeds=inputs_of(model, batch), attention_mask=batch.mask.long())
    torch.testing.assert_close(found, expected.last_hidden_state[batch.mask], rtol=1e-4, atol=1e-5)


def test_a_longformer_sees_its_window_and_cls_and_cls_sees_everything(longformer, small_data):
    config = settings(longformer, attention_window=4)
    model, tokenizer = load_recformer(config)
    model.eval()
    one_layer = model.layers
    del one_layer[1:]
    model.backbone.config.num_hidden_layers = 1
    batch = make_batch(small_data, tokenizer, config, model.length_multiple)
    reference = model(batch).last_hidden_state[2]
    changed_place, length = 12, int(batch.mask[2].sum())
    ids = batch.ids.clone()
    ids[2, changed_place] = 5 if ids[2, changed_place] != 5 else 6
    changed = model(replace(batch, ids=ids)).last_hidden_state[2]
    moved = ((changed - reference).abs().amax(1) > 1e-7)[:length].nonzero().flatten().tolist()
    # Two tokens on either side (half a window), and [CLS].
    assert moved == [0, *range(changed_place - 2, changed_place + 3)]


def test_saving_and_loading_gives_identical_vectors(bert, longformer, small_data, tmp_path):
    for folder in (bert, longformer):
        config = settings(folder, attention_window=8)
        model, tokenizer = load_recformer(config)
        batch = make_batch(small_data, tokenizer, config, model.length_multiple)
        vectors = model.eval().vectors(batch)
        out = tmp_path / folder.parent.name
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        assert (out / "model.safetensors").is_file()
        loaded = AutoModel.from_pretrained(out).eval()
        torch.testing.assert_close(loaded.vectors(batch), vectors, rtol=0, atol=0)
        assert AutoConfig.from_pretrained(out).size_config() == config.size
        again, _ = load_recformer(build(RecformerSettings, {**config.model_dump(mode="json"), "backbone": str(out)}))
        torch.testing.assert_close(again.eval().vectors(batch), vectors, rtol=0, atol=0)
        with pytest.raises(UserError, match=r"another llm\.recformer\.size"):
            load_recformer(settings(out, max_items=5, attention_window=8))


def test_too_few_positions_are_one_clear_line_and_can_be_repeated(bert, longformer, small_data):
    with pytest.raises(
        UserError, match=r"has 64 positions, a sequence has up to 104 .* to 64 at most, or .*extend_pos"
    ):
        load_recformer(settings(bert, max_tokens=100))
    with pytest.raises(UserError, match=r"has 128 positions, .* up to 160 .* to 128 at most"):
        load_recformer(settings(longformer, max_tokens=130, attention_window=32))
    for folder, first, there in ((bert, 0, 64), (longformer, 2, 128)):
        config = settings(folder, max_tokens=300, extend_positions=True, max_items=60, attention_window=4)
        model, tokenizer = load_recformer(config)
        table = model.backbone.embeddings.position_embeddings.weight
        assert len(table) == first + (304 if first == 0 else 300)
        torch.testing.assert_close(table[first + there : first + 2 * there], table[first : first + there])
        history = np.arange(1, small_data.n_items + 1).repeat(2)
        tokens = tokenise(small_data.items, ["title", "kind"], 32, tokenizer)
        sequences = SequenceMaker(tokens, config.size, tokenizer.cls_token_id)([history])
        assert sequences.lengths[0] > 200
        batch = pad(sequences, np.array([0]), tokenizer.pad_token_id, model.length_multiple)
        assert torch.isfinite(model.eval().vectors(batch)).all()


def test_what_is_no_encoder_is_one_clear_line(tmp_path, bert):
    with pytest.raises(UserError, match="is no text encoder"):
        load_recformer(settings(tmp_path / "nothing"))
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.cls_token = None
    BertModel(BertConfig(vocab_size=300, hidden_size=8, num_attention_heads=1)).save_pretrained(tmp_path / "no-cls")
    tokenizer.save_pretrained(tmp_path / "no-cls")
    with pytest.raises(UserError, match=r"needs a \[CLS\] and a \[PAD\]"):
        load_recformer(settings(tmp_path / "no-cls"))
    own = AutoTokenizer.from_pretrained(bert)
    size = {"vocab_size": 300, "max_position_embeddings": 64}
    decoder = GPT2Model(GPT2Config(n_positions=64, vocab_size=300, n_embd=8, n_layer=1, n_head=1))
    both = BartModel(
        BartConfig(
            **size, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1, decoder_attention_heads=1,
            encoder_ffn_dim=8, decoder_ffn_dim=8,
        )
    )  # fmt: skip
    for model, why in ((decoder, "does not see what comes after"), (both, "is no encoder that RECFORMER can be built")):
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        own.save_pretrained(folder)
        with pytest.raises(UserError, match=why):
            load_recformer(settings(folder))


@pytest.mark.parametrize("wanted", ["all", "none", [1], [0, 2]])
def test_the_layers_that_are_named_are_tuned_and_no_others(bert, wanted):
    model, _ = load_recformer(settings(bert))
    choose_tuned(model, OptimizerConfig(tune_layers=wanted))
    tuned = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    if wanted in ("all", "none"):
        assert tuned == (everything if wanted == "all" else set())
        return
    layers = {name for name in everything if any(f".layer.{number}." in name for number in wanted)}
    assert tuned == layers | {"token_types.weight", "item_positions.weight"}


def test_a_layer_that_is_not_there_is_one_clear_line_and_words_can_be_frozen(bert):
    model, _ = load_recformer(settings(bert))
    with pytest.raises(UserError, match="tune_layers 3: the backbone has 3 layers, counted from 0 to 2"):
        choose_tuned(model, OptimizerConfig(tune_layers=[3]))
    choose_tuned(model, OptimizerConfig(freeze_word_embeddings=True))
    assert not model.backbone.embeddings.word_embeddings.weight.requires_grad
    assert model.backbone.embeddings.position_embeddings.weight.requires_grad


def test_layers_that_share_their_weights_are_tuned_all_or_none():
    sizes = {"embedding_size": 8, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    model = wrap(AlbertModel(AlbertConfig(vocab_size=50, num_hidden_layers=3, **sizes)), settings(Path("albert")))
    choose_tuned(model, OptimizerConfig())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="the layers of albert cannot be told apart; tune all or none"):
        choose_tuned(model, OptimizerConfig(tune_layers=[0]))


def test_the_masked_lm_head_is_the_backbones_own_where_it_has_one(bert, longformer):
    from transformers import AutoModelForMaskedLM

    head = MaskedLMHead(32, 32, AutoConfig.from_pretrained(bert).vocab_size)
    assert head.load_pretrained(str(bert))
    with torch.no_grad():
        head.bias.normal_()
    whole = AutoModelForMaskedLM.from_pretrained(bert).eval()
    whole.cls.predictions.bias.data.copy_(head.bias)
    ids, labels = torch.arange(5, 25)[None], torch.arange(30, 50)
    hidden = whole.bert(ids).last_hidden_state[0]
    expected = F.cross_entropy(whole(ids).logits[0], labels)
    torch.testing.assert_close(head(hidden, whole.bert.embeddings.word_embeddings.weight, labels), expected)
    assert not MaskedLMHead(32, 32, 80).load_pretrained(str(longformer))  # saved without one


def test_wrapping_keeps_the_backbones_weights(bert):
    backbone = AutoModel.from_pretrained(bert)
    model = wrap(backbone, settings(bert))
    own = model.backbone.state_dict()
    for name, value in backbone.state_dict().items():
        if not name.startswith("pooler"):
            assert torch.equal(own[name], value)
