"""Item encoders that read texts: a text encoder that is trained with the recommender, against a naive one."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.objective import recommender_loss
from align.reader import Reader
from align.samples import Other, Sample, Text
from align.scoring import log_p_y_given_xs, make_inputs
from llm.config import EncoderConfig, LMRecConfig
from llm.lmrec import build_lmrec
from llm.text_encoder import TextEncoder
from llm.text_items import CatalogTexts, TrainedText, reader_of, vectors_by
from llm.tokenizer import train_tokenizer
from rec import item_encoder
from rec.build import build_model
from rec.config import RecConfig
from rec.item_encoder import KnowledgeConcat
from rec.models.sasrec import SASRec, SASRecConfig
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder
from rec.trainer import parameter_groups, train

N, D, L = 5, 8, 4
TEXTS = ["a red ball", "blue", "", "a long text about a green car", "a red ball"]
ITEMS = torch.tensor([[1, 2, 1, 4], [3, 5, 0, 0]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = train_tokenizer([*TEXTS, "thing number 0123456789 odd even"], 320, 64)
    torch.manual_seed(0)
    sizes = LMRecConfig(dim=16, heads=2, layers=1, context=64)
    build_lmrec(sizes, len(tokenizer), tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def encoder(folder) -> TextEncoder:
    return TextEncoder(folder, EncoderConfig(trained=True, lr=1e-3))


def model_of(items: KnowledgeConcat) -> SASRec:
    torch.manual_seed(1)
    torch.nn.init.normal_(items.fuse.weight)
    torch.nn.init.normal_(items.ids.weight)
    return SASRec(SASRecConfig(dim=D, heads=2, blocks=1, max_length=L, dropout=0.0), items)


def trained_items(encoder: TextEncoder, **options: object) -> TrainedText:
    return CatalogTexts(TEXTS, encoder).items(N, D, **options)


@pytest.mark.parametrize("standardise", [False, True])
def test_before_training_it_reads_what_a_frozen_encoder_gives(encoder, folder, standardise):
    items = trained_items(encoder, standardise=standardise)
    frozen = CatalogTexts(TEXTS, TextEncoder(folder, EncoderConfig())).items(N, D, standardise=standardise)
    assert isinstance(items, TrainedText)
    assert type(frozen) is KnowledgeConcat
    with torch.no_grad():
        frozen.ids.weight.copy_(items.ids.weight)
        frozen.fuse.weight.copy_(items.fuse.weight.normal_())
    for training in (False, True):
        expected = frozen.train(training)(ITEMS)
        torch.testing.assert_close(items.train(training)(ITEMS), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_is_that_of_encoding_every_place_by_itself(encoder):
    items = trained_items(encoder).train()
    items.fuse.weight.data.normal_()
    weight = torch.randn(2, L, D)
    (items(ITEMS) * weight).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in items.encoder.named_parameters()}
    items.zero_grad()
    total = 0.0
    for row, column in torch.cartesian_prod(torch.arange(2), torch.arange(L)).tolist():
        item = int(ITEMS[row, column])
        ids = [] if item == 0 else encoder.tokenizer(TEXTS[item - 1])["input_ids"]
        vector = torch.zeros(16)
        if ids:
            hidden = items.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(0)
            vector = torch.nn.functional.layer_norm(hidden, (16,))
        total = total + (items.fuse(torch.cat([items.ids.weight[item], vector])) * weight[row, column]).sum()
    total.backward()
    for name, parameter in items.encoder.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)
    assert any(gradient.abs().max() > 0 for gradient in found.values())


def test_of_several_texts_training_reads_any_and_ranking_the_first(encoder):
    several = CatalogTexts([f"{kind} {item}" for item in range(N) for kind in ("first", "second")], encoder)
    items = several.items(N, D)
    items.fuse.weight.data.normal_()
    one = torch.tensor([[1]])
    firsts, seconds = (
        items.fuse(torch.cat([items.ids.weight[1], vectors_by(items, encoder)([f"{kind} 0"])[0]]))
        for kind in ("first", "second")
    )
    torch.testing.assert_close(items.eval()(one)[0, 0], firsts, rtol=1e-4, atol=1e-5)
    read = torch.stack([items.train()(one)[0, 0] for _ in range(40)])
    is_first = (read - firsts).abs().amax(1) < 1e-4
    assert 5 < int(is_first.sum()) < 35
    torch.testing.assert_close(read[~is_first], seconds.expand(int((~is_first).sum()), D), rtol=1e-4, atol=1e-4)


def test_saved_it_answers_without_its_encoder_and_is_trained_on_with_it(encoder, tmp_path):
    model = model_of(trained_items(encoder, on_target=True, standardise=True))
    with torch.no_grad():
        for parameter in model.items.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    stale = model.items.knowledge.clone()
    model.items.refresh()
    assert not torch.allclose(stale, model.items.knowledge)
    model.save_pretrained(tmp_path)
    loaded = SASRec.from_pretrained(tmp_path)
    lengths = torch.tensor([4, 2])
    expected = model.eval().score_all(torch.arange(2), ITEMS, lengths)
    assert torch.equal(loaded.score_all(torch.arange(2), ITEMS, lengths), expected)
    before = loaded.items.knowledge.clone()
    CatalogTexts(TEXTS, encoder).tell(loaded.items)
    torch.testing.assert_close(loaded.items.knowledge, before)
    torch.testing.assert_close(loaded.items.train()(ITEMS[:1]), model.items.eval()(ITEMS[:1]), rtol=1e-4, atol=1e-5)


def test_an_item_encoder_that_nobody_offers_is_one_clear_line(encoder, tmp_path):
    model_of(trained_items(encoder)).save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"trained-text"', '"told"'))
    with pytest.raises(UserError, match="no item encoder is called 'told'"):
        SASRec.from_pretrained(tmp_path)


CONFIG = build(
    RecConfig,
    {
        "model": {"dim": 8, "heads": 2, "blocks": 1, "max_length": 8},
        "train": {"lr": 5e-3, "batch_size": 8, "epochs": 4, "patience": 4, "checkpoint_every": 1},
    },
)


def test_trained_with_the_recommender_and_resumed_to_the_bit(small_data, encoder, tmp_path, monkeypatch):
    texts = CatalogTexts(small_data.items["title"].to_pylist(), encoder)

    def build_it() -> SASRec:
        return build_model(CONFIG, small_data, lambda: texts.items(small_data.n_items, 8, standardise=True))

    untrained = build_it().items.encoder.state_dict()
    whole = train(build_it(), small_data, CONFIG, RunFolder(tmp_path / "a"), "test")
    trained = whole.items.encoder.state_dict()
    assert any(not torch.equal(value, trained[name]) for name, value in untrained.items())
    told = texts.encoder.tokens(texts.texts)
    torch.testing.assert_close(whole.items.knowledge[1:], whole.items.encode(told), rtol=1e-4, atol=1e-5)
    saved, steps = Checkpoints.save, []

    def save_then_die(self, step, *args, **kwargs):
        saved(self, step, *args, **kwargs)
        steps.append(step)
        if len(steps) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            train(build_it(), small_data, CONFIG, RunFolder(tmp_path / "b"), "test")
    resumed = train(build_it(), small_data, CONFIG, RunFolder(tmp_path / "b"), "test")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_the_encoder_has_a_rate_of_its_own(encoder):
    model = model_of(trained_items(encoder))
    plain, own = parameter_groups(model)
    assert own["lr"] == 1e-3
    assert set(own["params"]) == set(model.items.encoder.parameters())
    assert set(plain["params"]) | set(own["params"]) == set(model.parameters())
    assert len(plain["params"]) + len(own["params"]) == len(list(model.parameters()))


def test_alignment_trains_it_on_fresh_texts_and_refreshes_the_stored_ones(encoder):
    model = model_of(trained_items(encoder, standardise=True))
    draws = [[Text(nth, [1], [0.0], text)] for nth, text in enumerate(["a blue ball", ""])]
    others = [Other(0, "a green thing")]
    sample = Sample(0, 0, [1, 2, 4], 5, True, True, [2], [[1]], draws, others, [0.0, 0.0], 0.0, 0, 0)
    read = reader_of(model.items, encoder)
    found = log_p_y_given_xs(model.eval(), make_inputs([sample], read))
    vectors = vectors_by(model.items, encoder)
    for draw, value in zip(draws, found, strict=True):
        knowledge = model.items.knowledge[torch.tensor([[1, 2, 4]])]
        knowledge[0, 2], knowledge[0, 0] = vectors([draw[0].text])[0], vectors(["a green thing"])[0]
        alone = model.log_likelihood(torch.tensor([[1, 2, 4]]), torch.tensor([3]), torch.tensor([5]), knowledge)
        torch.testing.assert_close(value, alone[0], rtol=1e-4, atol=1e-5)

    reader = Reader(model, read, 1e-3, torch.device("cpu"), distributed=False)
    before, stored = [value.clone() for value in model.items.encoder.parameters()], model.items.knowledge.clone()
    reader.update([sample])
    assert any(not torch.equal(old, new) for old, new in zip(before, model.items.encoder.parameters(), strict=True))
    assert torch.equal(model.items.knowledge, stored)
    reader.refresh()
    assert not torch.equal(model.items.knowledge, stored)
    # The gradient by finite differences, in the direction of one weight.
    model.zero_grad()
    inputs, weight = make_inputs([sample], read), model.items.encoder.wte.weight
    recommender_loss(log_p_y_given_xs(model.eval(), inputs)).backward()
    index = int(weight.grad.abs().argmax())
    slope, values = weight.grad.flatten()[index].item(), []
    for shift in (-1e-3, 1e-3):
        with torch.no_grad():
            weight.view(-1)[index] += shift
            values.append(recommender_loss(log_p_y_given_xs(model, inputs)).item())
            weight.view(-1)[index] -= shift
    assert (values[1] - values[0]) / 2e-3 == pytest.approx(slope, rel=2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_encoder_is_trained_in_float32(folder, tmp_path, dtype):
    model = AutoModelForCausalLM.from_pretrained(folder).to(dtype)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    items = trained_items(TextEncoder(tmp_path, EncoderConfig(trained=True)))
    assert {parameter.dtype for parameter in items.encoder.parameters()} == {torch.float32}
    again = item_encoder.build(items.kind, items.settings())
    assert {parameter.dtype for parameter in again.encoder.parameters()} == {torch.float32}
