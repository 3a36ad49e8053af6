"""What a recommender reads of a sample: fresh texts at their places, stored ones elsewhere."""

import math
from dataclasses import replace

import pytest
import torch
from worlds import SMALL_MODELS

from align.config import AlignConfig
from align.generator import Generator, fresh_places
from align.reader import Reader
from align.samples import Other, Sample, Text
from align.scoring import Inputs, knowledge_with_fresh, log_p_y_given_xs, make_inputs
from align.snapshots import Snapshot
from rec.config import RecConfig
from rec.item_encoder import KnowledgeConcat
from rec.models import MODELS
from rec.models.base import SequenceRecommender
from rec.models.sasrec import SASRec, SASRecConfig
from rec.runtime.config import build
from rec.runtime.errors import UserError


def sample(items: list[int], places: list[int], draws: list[list[str]], others: list[Other] | None = None) -> Sample:
    texts = [[Text(nth, [1], [0.0], text) for nth, text in enumerate(draw)] for draw in draws]
    return Sample(
        0, 0, items, 5, True, True, places, [[1]] * len(places), texts, others or [], [0.0] * len(draws), 0.0, 0, 0
    )


def encode(texts: list[str]) -> torch.Tensor:
    """Three numbers a text; counts how often it is asked."""
    encode.asked += texts
    return torch.tensor([[float(text), 10 * float(text), 0.0] for text in texts]).reshape(-1, 3)


def read_small(texts: list[str]) -> torch.Tensor:
    return torch.tensor([[float(text) == number for number in (3, 4, 7)] for text in texts]).float()


SAMPLES = [
    sample([1, 2, 3, 4], [1, 3], [["7", "8"], ["9", "7"]]),
    sample([5, 6], [0], [["3"], ["4"]]),
]


@pytest.fixture
def inputs() -> Inputs:
    encode.asked = []
    return make_inputs(SAMPLES, encode)


def test_every_draw_is_a_history_with_its_own_texts_at_their_places(inputs):
    stored = 100 + torch.arange(8)[:, None].expand(8, 3).float()
    found = knowledge_with_fresh(stored, inputs, inputs.texts)[..., 0]
    expected = [[101, 7, 103, 8], [101, 9, 103, 7], [3, 106], [4, 106]]
    for row, values in enumerate(expected):
        assert int(inputs.lengths[row]) == len(values)
        assert found[row, : len(values)].tolist() == values
    assert inputs.targets.tolist() == [5, 5, 5, 5]


def test_like_texts_are_encoded_once(inputs):
    assert sorted(encode.asked) == ["3", "4", "7", "8", "9"]


def test_stored_vectors_as_fresh_ones_change_nothing(inputs):
    torch.manual_seed(0)
    items = KnowledgeConcat(8, 16, 3)
    items.set_knowledge(torch.randn(8, 3))
    torch.nn.init.normal_(items.fuse.weight)
    model = SASRec(SASRecConfig(dim=16, heads=2, max_length=4), items).eval()
    own = items.knowledge[inputs.items[inputs.rows, inputs.places]]
    same = Inputs(**{**vars(inputs), "texts": own, "numbers": torch.arange(len(own))})
    plain = model.log_likelihood(inputs.items, inputs.lengths, inputs.targets)
    torch.testing.assert_close(log_p_y_given_xs(model, same), plain)
    assert not torch.allclose(log_p_y_given_xs(model, inputs), plain)


def test_fresh_items_are_the_last_random_ones_or_all():
    def places(length: int, seed: str = "0", **settings: object) -> list[int]:
        return fresh_places(AlignConfig(**settings), length, seed)

    assert places(5) == [4]
    assert places(5, fresh_items=3) == [2, 3, 4]
    assert places(2, fresh_items=3) == [0, 1]
    assert places(4, fresh="all") == [0, 1, 2, 3]
    drawn = [tuple(places(6, str(seed), fresh="random", fresh_items=2)) for seed in range(300)]
    assert all(first < second for first, second in drawn)
    assert len(set(drawn)) == 15
    assert places(6, "9", fresh="random") == places(6, "9", fresh="random")


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if issubclass(model, SequenceRecommender)])
def test_every_sequence_model_scores_texts_and_learns_from_them(name):
    torch.manual_seed(0)
    config = build(RecConfig, {"model": {"name": name, "dim": 16, "max_length": 8, **SMALL_MODELS.get(name, {})}})
    items = KnowledgeConcat(8, 16, 3, on_target=True)
    items.set_knowledge(torch.randn(8, 3))
    torch.nn.init.normal_(items.fuse.weight)
    recommender = MODELS[name](config.model, items).eval()

    @torch.no_grad()
    def likelihoods() -> torch.Tensor:
        return log_p_y_given_xs(recommender.eval(), make_inputs(SAMPLES, read_small))

    reader = Reader(recommender, read_small, 1e-2, torch.device("cpu"), distributed=False)

    first = likelihoods()
    assert first.shape == (4,)
    assert (first < 0).all()
    assert first[0] != first[1]  # the same history with other texts
    assert first[2] != first[3]
    for _ in range(20):
        figures = reader.update(SAMPLES)
    assert all(math.isfinite(value) for value in figures.values())
    assert likelihoods().mean() > first.mean()


@pytest.mark.parametrize(
    ("with_text", "without", "message"),
    [
        ([0.0, math.nan], [0.0], r"p\(y\|x,s\) is no number for 1 of 2 .*v000007.*align\.trainer\.rec_lr"),
        ([0.0], [-math.inf], r"p\(y\|x\) is no number for 1 of 1 .*frozen.*rec\.train\.lr"),
    ],
)
def test_a_likelihood_that_is_no_number_is_no_reward(with_text, without, message, tmp_path):
    generator = Generator.__new__(Generator)
    generator.snapshot = Snapshot(tmp_path / "v000007", 7, 70, [], [])
    with pytest.raises(UserError, match=message):
        generator._refuse_no_numbers(with_text, without)
    generator._refuse_no_numbers([0.0, -700.0], [0.0])


def test_other_items_read_what_was_said_of_them_in_every_draw():
    encode.asked = []
    told = [sample([1, 2, 3], [2], [["7"], ["8"]], [Other(0, "9")]), sample([4, 5], [1], [["7"]])]
    inputs, stored = make_inputs(told, encode), 100 + torch.arange(8)[:, None].expand(8, 3).float()
    found = knowledge_with_fresh(stored, inputs, inputs.texts)[..., 0]
    assert found[0].tolist() == [9, 102, 7]
    assert found[1].tolist() == [9, 102, 8]
    assert found[2, :2].tolist() == [104, 7]
    assert sorted(encode.asked) == ["7", "8", "9"]


def test_no_text_is_encoded_twice_in_a_step():
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(dim=16, heads=2, max_length=4), KnowledgeConcat(8, 16, 3))
    encode.asked = []
    Reader(model, encode, 0.0, torch.device("cpu"), distributed=False).update(SAMPLES)
    assert sorted(encode.asked) == ["3", "4", "7", "8", "9"]


def test_drift_is_of_what_rewards_not_of_what_is_fitted():
    torch.manual_seed(0)
    items = KnowledgeConcat(8, 16, 3)
    model = SASRec(SASRecConfig(dim=16, heads=2, max_length=4, dropout=0.0), items).eval()
    reader = Reader(model, read_small, 0.0, torch.device("cpu"), distributed=False)
    with torch.no_grad():
        now = log_p_y_given_xs(model, make_inputs([SAMPLES[1]], read_small))
    moved = replace(SAMPLES[1], log_p_y_given_xs=[float(now[0]) - 0.25, 99.0])
    assert reader.update([SAMPLES[0]], [moved])["reward_drift"] == pytest.approx(0.25, abs=1e-5)
    # By default they are the same.
    assert reader.update([moved])["reward_drift"] == pytest.approx(0.25, abs=1e-5)
