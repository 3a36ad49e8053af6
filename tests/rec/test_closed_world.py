"""The closed world: what it promises about its items and users is true."""

import itertools
import sys
from collections import Counter

import numpy as np
import pytest

from launch import cli
from rec.data.builtin import prepare_builtin
from rec.data.prepared import Prepared
from rec.data.readers.closed_world import ATTRIBUTES, World, make
from rec.runtime.errors import UserError


def prepare(monkeypatch, *arguments):
    """The exit code of ``recalign prepare``."""
    monkeypatch.setattr(sys, "argv", ["recalign", "prepare", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as end:
        return end.code
    return 0


def transitions(raw, attribute):
    """How often each sentence of ``attribute`` is followed by each other one, user by user."""
    sentence = dict(zip(raw.items["item_id"].to_pylist(), raw.items[attribute].to_pylist(), strict=True))
    told = [(row["user_id"], sentence[row["item_id"]]) for row in raw.interactions.to_pylist()]
    return Counter((a, b) for (user, a), (next_user, b) in itertools.pairwise(told) if user == next_user)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_driving_attribute_and_no_other_decides_what_follows(seed):
    raw = make(World(items=600, values=30, users=800, seed=seed))
    for attribute in ATTRIBUTES:
        counts = transitions(raw, attribute)
        likeliest, total = Counter(), Counter()
        for (value, _), count in counts.items():
            likeliest[value], total[value] = max(likeliest[value], count), total[value] + count
        share = sum(likeliest.values()) / sum(total.values())
        if attribute == raw.options["driving"]:
            # 0.6 of the steps, and a thirtieth of the others by chance; 5,600 steps, so 4 standard errors are 0.026.
            assert share == pytest.approx(0.6 + 0.4 / 30, abs=0.026)
        else:
            assert share < 0.12


def test_what_drives_depends_on_the_seed():
    assert len({make(World(items=20, values=2, users=1, seed=seed)).options["driving"] for seed in range(12)}) > 1


def test_every_item_has_one_true_sentence_of_each_attribute_and_values_are_balanced():
    raw = make(World(items=600, values=30, users=5))
    titles = raw.items["title"].to_pylist()
    assert len(set(titles)) == 600
    for attribute, sentence in ATTRIBUTES.items():
        told = Counter(raw.items[attribute].to_pylist())
        assert set(told.values()) == {20}
        begin = sentence.split("{")[0]
        assert all(text.startswith(begin) for text in told)
    words = {text.split()[-1] for attribute in ATTRIBUTES for text in raw.items[attribute].to_pylist()}
    assert len(words) == len(ATTRIBUTES) * 30, "no two attributes share a value's word"


def test_the_same_seed_is_the_same_world(tmp_path, monkeypatch):
    prepare_builtin("closed-world", tmp_path / "a")
    assert prepare(monkeypatch, "closed-world", "--out", tmp_path / "b") == 0
    assert prepare(monkeypatch, "closed-world", "--out", tmp_path / "c", "--world-seed", "1") == 0
    a, b, c = (Prepared.load(tmp_path / name) for name in "abc")
    assert a.meta["content_hash"] == b.meta["content_hash"] != c.meta["content_hash"]
    assert a.meta["options"]["driving"] in ATTRIBUTES
    assert a.n_users == 1250
    assert np.median(a.train_counts[1:]) <= 5, "few interactions of each item are the point"


@pytest.mark.parametrize(
    "size", [{"values": 1}, {"items": 3, "values": 4}, {"users": 0}, {"length": 2}, {"follow": 1.5}]
)
def test_an_impossible_world_is_refused(size):
    with pytest.raises(UserError, match="no world has the size"):
        make(World(**size))


def test_a_world_that_needs_too_many_words_is_refused():
    with pytest.raises(UserError, match="too large"):
        make(World(items=400_000, users=1))


def test_raw_is_for_sources_that_read(tmp_path, monkeypatch, capsys):
    out = ("--out", tmp_path / "a")
    for arguments, message in (
        (["closed-world", "--raw", "x"], "closed-world is made up: no --raw"),
        (["movielens"], "movielens needs --raw"),
        (["movielens", "--raw", "x", "--world-seed", "1"], "--world-seed belongs to closed-world only"),
    ):
        assert prepare(monkeypatch, *arguments, *out) == 2
        assert message in capsys.readouterr().err
