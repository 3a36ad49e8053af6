"""What the texts say, and what saying it is worth, against sums by hand."""

import math

import pyarrow as pa
import pytest

from align.samples import Sample, Text
from align.watch import Watch

ITEMS = pa.table({"item_id": ["a", "b"], "taste": ["sweet", "sour"], "look": ["red", "sour"]})


def sample(items: list[int], places: list[int], draws: list[list[str]], likelihoods: list[float]) -> Sample:
    texts = [[Text(0, [1], [0.0], text) for text in draw] for draw in draws]
    log_p = [math.log(value) for value in likelihoods]
    return Sample(0, 0, items, 1, True, True, places, [[1]] * len(places), texts, [], log_p, 0.0, 0, 0)


def test_of_one_text_a_pair_the_gap_is_between_pairs():
    samples = [
        sample([1], [0], [["sweet"]], [0.4]),
        sample([1], [0], [["sweet"]], [0.2]),
        sample([2], [0], [["sweet"]], [0.1]),
        sample([1, 2], [0, 1], [["sweet", "sour"]], [0.9]),
    ]
    figures = Watch(["taste", "look"], ITEMS).figures(samples)
    assert figures["said_taste"] == pytest.approx(4 / 5)
    # p(y|x) is 1 in all of them.
    assert figures["gap_taste"] == pytest.approx(0.3 - 0.1)
    assert figures["gap_look"] is None


def test_shares_and_gaps_of_each_column():
    samples = [
        sample([1, 2], [1], [["sour"], ["green"], ["sour"]], [0.3, 0.1, 0.2]),
        sample([2, 1], [1], [["sweet"], ["red"], ["sour"]], [0.1, 0.1, 0.4]),
        sample([1], [0], [["sweet"], ["sweet"], ["sweet"]], [0.1, 0.2, 0.3]),
        sample([1, 2], [0, 1], [["sweet", "nothing"]], [0.5]),
    ]
    figures = Watch(["taste", "look"], ITEMS).figures(samples)
    assert figures["said_taste"] == pytest.approx((2 + 1 + 3 + 1) / (3 + 3 + 3 + 2))
    assert figures["said_look"] == pytest.approx((2 + 1 + 0 + 0) / 11)
    # Means 0.2 in both: (1.5 + 1) / 2 - 0.5 and 0.5 - (0.5 + 2) / 2.
    assert figures["gap_taste"] == pytest.approx((0.75 - 0.75) / 2)
    assert figures["gap_look"] == pytest.approx((0.75 + (0.5 - 1.25)) / 2)
    assert Watch(["look"], ITEMS).figures(samples[2:])["gap_look"] is None
    assert Watch([], ITEMS).figures(samples) == {}
