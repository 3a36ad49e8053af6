"""What the Elephant's study claims, from made-up ranks."""

import pytest
import torch

from launch.elephant import claims
from launch.elephant.config import Cell
from rec.evaluation import Metrics


def metrics(ranks: list[float]) -> Metrics:
    rows = torch.arange(len(ranks))
    return Metrics(torch.tensor(ranks, dtype=torch.double), (10,), rows, rows)


def made_up(figures: dict[tuple[str, str], float], seed: int = 1) -> dict[Cell, dict[str, Metrics]]:
    """Ranks in which each cell hits its share of 400 users at rank 1."""
    return {
        Cell(model, variant, "R", seed): {
            protocol: metrics([1.0 if user < share * 400 else 99.0 for user in range(400)])
            for protocol in ("elephant-100", "elephant-full")
        }
        for (model, variant), share in figures.items()
    }


def test_claims_answer_yes_and_no_under_every_protocol():
    paper = {
        ("SASRec", "random"): 0.3, ("SASRec", "frozen vanilla"): 0.2, ("SASRec", "trainable vanilla"): 0.25,
        ("SASRec", "frozen PT"): 0.3, ("SASRec", "trainable PT"): 0.5, ("SASRec", "frozen FT"): 0.4,
        ("SASRec", "trainable FT"): 0.55, ("SASRec", "further all"): 0.56, ("SASRec", "further items"): 0.6,
        ("RECFORMER", "RECFORMER FT2"): 0.38,
    }  # fmt: skip
    serving = {"SASRec": {"parameters": [5, 5], "latency_ratio": 1.02}}
    found = claims.claims(made_up(paper), serving, "R")
    assert [claim["id"].count("elephant-100") for claim in found] == [1] * 9 + [0] * 10
    assert [claim["id"].count("elephant-full") for claim in found] == [0] * 9 + [1] * 9 + [0]
    assert [claim["holds"] for claim in found] == [True] * 19
    assert found[2]["figure"] == pytest.approx(0.2)
    assert found[2]["low"] > 0.1
    assert not any("undecided" in claim for claim in found)
    other = {key: 0.7 - value for key, value in paper.items()}
    other["SASRec", "trainable vanilla"] = 0.69
    serving = {"SASRec": {"parameters": [5, 6], "latency_ratio": 1.0}}
    found = claims.claims(made_up(other), serving, "R")
    assert [claim["holds"] for claim in found][-10:] == [False] * 10
    assert claims.claims({}, {}, "R") == []


def test_the_best_of_all_is_undecided_where_the_next_is_as_good():
    near = {("SASRec", "further items"): 0.5025, ("SASRec", "trainable FT"): 0.5, ("SASRec", "random"): 0.1}
    [claim, _] = claims.claims(made_up(near), {}, "R")
    assert claim["id"].startswith("SASRec: (d) further items beats trainable FT")
    assert claim["figure"] > 0
    assert not claim["holds"]
    assert claim["undecided"]


@pytest.mark.parametrize(
    ("claim", "one", "other"),
    [("(a)", "trainable vanilla", "random"), ("(b)", "trainable PT", "random"), ("(e)", "frozen FT", "RECFORMER FT2")],
)
def test_a_difference_within_noise_is_neither_yes_nor_no(claim, one, other):
    model = "RECFORMER" if other == "RECFORMER FT2" else "SASRec"
    for difference in (-0.0025, 0.0025):
        ranks = made_up({("SASRec", one): 0.5 + difference, (model, other): 0.5})
        found = claims.claims(ranks, {}, "R")[0]
        assert claim in found["id"]
        assert not found["holds"]
        assert found["undecided"]


def test_what_differs_by_less_than_the_margin_does_not_help_and_reaches():
    figures = {("SASRec", "random"): 0.5, ("RECFORMER", "RECFORMER FT2"): 0.5}
    for share, beats, reaches in ((0.5, False, True), (0.55, True, True), (0.45, False, False)):
        own = {("SASRec", "trainable vanilla"): share, ("SASRec", "frozen FT"): share}
        vanilla, frozen = claims.claims(made_up(figures | own), {}, "R", margin=0.02)[:2]
        assert (vanilla["holds"], frozen["holds"]) == (not beats, reaches)
        assert (vanilla["bound"], frozen["bound"]) == (0.01, -0.01)
        assert "undecided" not in vanilla | frozen
    [claim] = claims.claims(made_up({("SASRec", "random"): 0.5, ("SASRec", "trainable PT"): 0.5}), {}, "R", 0.02)[:1]
    assert claim["undecided"]  # to beat is to be better, by however little


def test_variants_without_a_common_seed_are_not_compared():
    """One of them diverged at the other's."""
    found = {
        Cell("SASRec", "random", "MiniLM", 1): {"full": metrics([1, 2, 3])},
        Cell("SASRec", "trainable PT", "MiniLM", 2): {"full": metrics([1, 1, 1])},
        Cell("SASRec", "frozen PT", "MiniLM", 2): {"full": metrics([1, 2, 1])},
        Cell("SASRec", "further items", "MiniLM", 1): {"full": metrics([1, 1, 2])},
    }
    names = [claim["id"] for claim in claims.claims(found, {}, "MiniLM")]
    assert [name.partition(" (NDCG")[0] for name in names] == [
        "SASRec: (c) trainable PT beats frozen PT",
        "SASRec: (d) further items beats random",
    ]


def test_pt_vectors_of_every_recformer_are_compared_with_untuned_ones():
    ranks = made_up({("SASRec", "random"): 0.2, ("SASRec", "trainable vanilla"): 0.4, ("SASRec", "trainable PT"): 0.6})
    more = made_up({("SASRec", "trainable PT"): 0.3, ("RECFORMER", "RECFORMER FT2"): 0.9})
    ranks |= {cell._replace(recformer="1 %"): own for cell, own in more.items()}
    answers = {claim["id"].partition(" (NDCG")[0]: claim["holds"] for claim in claims.claims(ranks, {}, "R")}
    assert answers == {
        "SASRec: (a) trainable vanilla does not beat random": False,
        "SASRec: (b) trainable PT beats random": True,
        "SASRec: (b) trainable PT beats trainable vanilla": True,
        "SASRec: (b) trainable PT of 1 % beats random": True,
        "SASRec: (b) trainable PT of 1 % beats trainable vanilla": False,
    }


def test_figure_and_interval_are_of_the_seeds_that_both_have():
    ranks = made_up({("SASRec", "trainable PT"): 0.5, ("SASRec", "random"): 0.4})
    ranks |= made_up({("SASRec", "trainable PT"): 0.7, ("SASRec", "random"): 0.5}, seed=2)
    ranks |= made_up({("SASRec", "trainable PT"): 0.0}, seed=3)
    claim = claims.claims(ranks, {}, "R")[0]
    assert claim["figure"] == pytest.approx(0.15)
    assert claim["low"] < 0.15 < claim["high"]


def test_fixed_vectors_beside_an_id_and_recformers_are_compared_with_the_first_ones():
    figures = {("SASRec", "random"): 0.4, ("SASRec", "id+vanilla"): 0.4, ("SASRec", "id+PT"): 0.5}
    ranks = made_up(figures | {("RECFORMER", "RECFORMER FT2"): 0.3})
    for name, share in (("trained table", 0.4), ("layer 1", 0.2)):
        ranks |= {
            cell._replace(recformer=name): own for cell, own in made_up({("RECFORMER", "RECFORMER FT2"): share}).items()
        }
    found = claims.claims(ranks, {}, "R", margin=0.02)
    assert {claim["id"].partition(" (NDCG")[0]: claim["holds"] for claim in found} == {
        "SASRec: (f) id+vanilla does not beat random": True,
        "SASRec: (f) id+PT beats random": True,
        "RECFORMER: (g) RECFORMER FT2 of trained table beats RECFORMER FT2": True,
        "RECFORMER: (g) RECFORMER FT2 of trained table reaches RECFORMER FT2": True,
        "RECFORMER: (g) RECFORMER FT2 of layer 1 beats RECFORMER FT2": False,
        "RECFORMER: (g) RECFORMER FT2 of layer 1 reaches RECFORMER FT2": False,
    }


def test_a_recformer_that_ranked_a_sample_is_compared_on_those_users_alone():
    ranks = made_up({("SASRec", "random"): 0.25, ("SASRec", "trainable PT"): 0.5, ("SASRec", "frozen FT"): 0.5})
    cell = Cell("RECFORMER", "RECFORMER FT2", "R", 1)
    sample = torch.arange(0, 400, 4)
    own = {protocol: metrics([99.0] * 400).of(sample) for protocol in ("elephant-100", "elephant-full")}
    # A quarter of the sample is hit, and all users outside it.
    hits = metrics([1.0 if user % 4 or user < 100 else 99.0 for user in range(400)])
    ranks[Cell("SASRec", "frozen FT", "R", 1)] = dict.fromkeys(own, hits)
    whole = claims.claims(ranks, {}, "R")
    sampled = {claim["id"]: claim for claim in claims.claims(ranks | {cell: own}, {}, "R")}
    for claim in whole:
        assert sampled.pop(claim["id"]) == claim
    for claim in sampled.values():
        assert "(e) frozen FT reaches RECFORMER FT2" in claim["id"]
        assert claim["figure"] == 0.25
        assert 0.15 < claim["low"] < 0.25 < claim["high"] < 0.35
    assert len(sampled) == 2
