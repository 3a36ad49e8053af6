import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from llm.config import PRESETS, LMRecConfig
from llm.lmrec import build_lmrec
from llm.order import Order, dealt
from llm.packing import Document, best_fit, hidden_states, pack, places_of_branches
from llm.schedules import learning_rate, recommendation_weight
from rec.runtime.config import build
from rec.runtime.errors import UserError

EOS = 0
# Table 9's rows: layers, width, inner width, millions of parameters. With the d_ffn that it prints for them the last
# two are not what they are called.
TABLE_9 = {
    "1.7M": (4, 32, 128, 1.72), "7M": (4, 128, 512, 7.49), "20M": (8, 256, 1024, 19.71), "64M": (12, 512, 2048, 64.61),
    "125M": (12, 768, 3072, 125.23), "210M": (24, 768, 3072, 210.28),
    "125M-printed": (12, 768, 2048, 106.34), "210M-printed": (24, 768, 2048, 172.51),
}  # fmt: skip


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_counts_what_table_9_says(preset):
    config = LMRecConfig(preset=preset)
    with torch.device("meta"):
        model = build_lmrec(config, config.vocabulary, EOS)
    layers, width, inner, millions = TABLE_9[preset]
    attention, mlp, norms = 4 * width * width + 4 * width, 2 * width * inner + inner + width, 4 * width
    by_hand = (50_258 + 2048) * width + layers * (attention + mlp + norms) + 2 * width
    assert sum(parameter.numel() for parameter in model.parameters()) == by_hand
    assert by_hand / 1e6 == pytest.approx(millions, abs=0.005)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_what_a_recipe_gives_goes_before_the_preset():
    config = build(LMRecConfig, {"preset": "7M", "vocabulary": 4096, "context": 512})
    assert (config.dim, config.layers, config.ffn) == (128, 4, 512)
    assert (config.vocabulary, config.context) == (4096, 512)
    assert build(LMRecConfig, config.model_dump()) == config
    with pytest.raises(UserError, match="preset"):
        build(LMRecConfig, {"preset": "8M"})


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_lmrec(LMRecConfig(dim=32, heads=4, layers=2, context=64), 50, EOS).eval()


def documents(seed=0, count=9):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        ids = rng.integers(1, 50, size=rng.integers(1, 20)).tolist()
        branches = sorted(rng.choice(len(ids) + 1, size=rng.integers(0, min(4, len(ids) + 1)), replace=False).tolist())
        found.append(Document(ids, branches))
    return found


@torch.no_grad()
def separately(model, ids):
    return GPT2LMHeadModel.forward(model, torch.tensor([ids])).logits[0]


@pytest.mark.parametrize(
    ("path", "longest", "trained"), [("eager", 1024, True), ("sdpa", 0, True), ("sdpa", 1024, False)]
)
def test_packed_logits_are_separate_logits(model, path, longest, trained, monkeypatch):
    monkeypatch.setattr("llm.packing.LONGEST_EAGER", longest)
    own = documents()
    rows = best_fit([len(document) for document in own], 40)
    packed = pack(own, rows, EOS, 48)
    with torch.set_grad_enabled(trained):
        logits = model.lm_head(hidden_states(model, packed)).detach()
    assert model.config._attn_implementation == path
    for row, numbers in enumerate(rows):
        place = 0
        for number in numbers:
            ids = own[number].ids
            torch.testing.assert_close(logits[row, place : place + len(ids)], separately(model, ids), atol=2e-5, rtol=0)
            place += len(own[number])
    # [EOS] after every prefix that was asked for, each in a pass of its own.
    places = iter(places_of_branches(own, rows, 48).tolist())
    for document in own:
        for before in document.branches:
            alone = separately(model, [*document.ids[:before], EOS])[-1]
            torch.testing.assert_close(logits.flatten(0, 1)[next(places)], alone, atol=2e-5, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_packed_logits_are_separate_logits_on_the_flash_path(model):
    own = [Document(document.ids) for document in documents()]
    rows = best_fit([len(document) for document in own], 40)
    device_model = build_lmrec(LMRecConfig(dim=32, heads=4, layers=2, context=64), 50, EOS).cuda().eval()
    device_model.load_state_dict(model.state_dict())
    packed = pack(own, rows, EOS, 48).to(torch.device("cuda"))
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        logits = device_model.lm_head(hidden_states(device_model, packed)).float().cpu()
    assert device_model.config._attn_implementation == "recalign_end_to_end"
    for row, numbers in enumerate(rows):
        place = 0
        for number in numbers:
            ids = own[number].ids
            torch.testing.assert_close(logits[row, place : place + len(ids)], separately(model, ids), atol=2e-2, rtol=0)
            place += len(ids)


def test_what_flash_attention_is_told_are_the_documents_bounds():
    own = [Document([1, 2, 3]), Document([4, 5]), Document([6, 7, 8, 9])]
    packed = pack(own, [[0, 1], [2]], EOS, 6)
    assert packed.bounds().tolist() == [0, 3, 5, 6, 10, 12]
    assert packed.documents.tolist() == [[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, -1, -1]]


def test_best_fit_loses_no_document_and_little_room():
    lengths = np.random.default_rng(0).integers(1, 200, size=3000)
    rows = best_fit(lengths, 512, window=1000)
    assert sorted(number for row in rows for number in row) == list(range(3000))
    assert max(lengths[row].sum() for row in rows) <= 512
    assert lengths.sum() / (512 * len(rows)) > 0.98


def test_schedules_at_begin_middle_and_end():
    def lr(step):
        return learning_rate(step, 1000, 2.0, 0.01)

    assert [lr(0), lr(9), lr(505), lr(1000)] == pytest.approx([0.2, 2.0, 1.1, 0.2])
    assert all(
        earlier > later for earlier, later in zip(map(lr, range(10, 999)), map(lr, range(11, 1000)), strict=True)
    )
    weights = [recommendation_weight(step, 1000, 0.01) for step in (0, 500, 1000)]
    assert weights == pytest.approx([0.01, 0.0055, 0.001])


def test_the_order_is_the_same_on_any_number_of_ranks_and_from_any_step():
    whole = Order(10, 4, seed=3)
    batches = [whole.samples(step) for step in range(10)]
    for begin in range(0, 40, 10):
        epoch = np.concatenate(batches)[begin : begin + 10]
        assert sorted(epoch.tolist()) == list(range(10))
    assert Order(10, 4, seed=3).samples(7).tolist() == batches[7].tolist()
    assert np.concatenate(batches)[:10].tolist() != np.concatenate(batches)[10:20].tolist()
    for size in (1, 2, 4):
        own = [dealt(batches[2], rank, size) for rank in range(size)]
        assert sorted(np.concatenate(own).tolist()) == sorted(batches[2].tolist())


def test_a_checkpoint_is_a_stock_decoder(model, tmp_path):
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is GPT2LMHeadModel
    torch.testing.assert_close(separately(again, [1, 2, 3]), separately(model, [1, 2, 3]))
