"""Full ranking against a naive loop over users and items."""

import math

import pytest
import torch

from rec import evaluation
from rec.config import EvaluateConfig
from rec.evaluation import evaluate, evaluate_many
from rec.item_encoder import IDTable
from rec.models.sasrec import SASRec, SASRecConfig
from rec.negatives import draw_negatives
from rec.protocol import PRESETS, Protocol, preset
from rec.runtime.errors import UserError


def naive_rank(scores: list[float], target: int, left_out: set[int]) -> float:
    """Place of item ``target`` (from 1) among items 1..N; ties count half."""
    rank = 1.0
    for item, score in enumerate(scores, start=1):
        if item == target or item in left_out:
            continue
        if score > scores[target - 1]:
            rank += 1
        elif score == scores[target - 1]:
            rank += 0.5
    return rank


def coarse_model(n_items: int) -> SASRec:
    """A random model with few distinct scores: many ties."""
    torch.manual_seed(1)
    model = SASRec(SASRecConfig(dim=16, heads=2, max_length=6), IDTable(n_items, 16)).eval()
    plain = model.scores
    model.scores = lambda states, out=None: torch.div((plain(states) * 60).round(), 4, out=out)
    return model


@pytest.mark.parametrize("seen", ["rank", "mask"])
@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize(("scored", "compared"), [(256, 32), (5, 2)])
def test_full_ranking_equals_a_naive_loop(small_data, monkeypatch, seen, split, scored, compared):
    monkeypatch.setattr(evaluation, "SCORED_ROWS", scored)
    monkeypatch.setattr(evaluation, "COMPARED_ROWS", compared)
    model = coarse_model(small_data.n_items)
    metrics = evaluate(model, small_data, split, EvaluateConfig(seen=seen, cutoffs=(1, 10), batch_size=7))
    ranks, ties = [], 0
    for user in range(small_data.n_users):
        sequence = small_data.sequence[small_data.offsets[user] : small_data.offsets[user + 1]].tolist()
        history, target = (sequence[:-2], sequence[-2]) if split == "valid" else (sequence[:-1], sequence[-1])
        with torch.no_grad():
            scores = model.scores(model(torch.tensor([history[-6:]]))[0, -1]).tolist()
        ties += scores.count(scores[target - 1]) - 1
        ranks.append(naive_rank(scores, target, set(history) - {target} if seen == "mask" else set()))
    assert ties > 20
    assert metrics.ranks.tolist() == ranks
    summary = metrics.summary()
    hits = [rank <= 10 for rank in ranks]
    gains = [1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in ranks]
    assert summary["HR@10"] == pytest.approx(sum(hits) / len(hits))
    assert summary["NDCG@10"] == pytest.approx(sum(gains) / len(gains))
    assert summary["MRR"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
    mean = sum(gains) / len(gains)
    variance = sum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1)
    assert summary["NDCG@10_se"] == pytest.approx(math.sqrt(variance / len(gains)))


@pytest.mark.parametrize(("ties", "rank"), [("mean", 15.5), ("optimistic", 1.0), ("pessimistic", 30.0)])
def test_a_constant_model_gets_what_the_tie_rule_says(small_data, ties, rank):
    model = coarse_model(small_data.n_items)
    model.scores = lambda states, out=None: torch.zeros(len(states), small_data.n_items)
    assert set(evaluate(model, small_data, "test", EvaluateConfig(ties=ties)).ranks.tolist()) == {rank}


def test_a_diverged_model_gets_no_score_at_all(small_data):
    model = coarse_model(small_data.n_items)
    torch.nn.init.constant_(model.norm.bias, float("nan"))
    with pytest.raises(UserError, match="diverged"):
        evaluate(model, small_data, "test", EvaluateConfig())


def test_a_subset_of_users_gets_the_same_ranks(small_data):
    model = coarse_model(small_data.n_items)
    everyone = evaluate(model, small_data, "test", EvaluateConfig())
    some = evaluate(model, small_data, "test", EvaluateConfig(batch_size=2), instances=[5, 3, 11])
    assert some.ranks.tolist() == everyone.ranks[[5, 3, 11]].tolist()


def test_evaluating_leaves_training_mode_alone(small_data):
    model = coarse_model(small_data.n_items).train()
    evaluate(model, small_data, "test", EvaluateConfig())
    assert model.training


def test_sampled_ranking_equals_a_naive_loop(small_data):
    model = coarse_model(small_data.n_items)
    protocol = Protocol(candidates="sampled", negatives=9, ties="optimistic")
    metrics = evaluate_many(model, small_data, "test", {"": protocol}, batch_size=7)[""]
    negatives = draw_negatives(protocol, small_data, "test")
    for user in range(small_data.n_users):
        sequence = small_data.sequence[small_data.offsets[user] : small_data.offsets[user + 1]].tolist()
        with torch.no_grad():
            scores = model.scores(model(torch.tensor([sequence[:-1][-6:]]))[0, -1]).tolist()
        better = sum(scores[item - 1] > scores[sequence[-1] - 1] for item in negatives[user].tolist())
        assert metrics.ranks[user] == 1 + better


@pytest.mark.parametrize("cold_targets", ["rank", "drop", "miss"])
def test_cold_targets_are_ranked_dropped_or_missed(small_data, monkeypatch, cold_targets):
    model = coarse_model(small_data.n_items)
    targets = small_data.targets("test")
    counts = small_data.train_counts.clone()
    counts[targets[0]] = 0
    monkeypatch.setitem(vars(small_data), "train_counts", counts)
    cold = targets == targets[0]
    metrics = evaluate(model, small_data, "test", EvaluateConfig(cold_targets=cold_targets))
    plain = evaluate(model, small_data, "test", EvaluateConfig())
    if cold_targets == "drop":
        assert metrics.instances.tolist() == (~cold).nonzero()[:, 0].tolist()
        assert metrics.ranks.tolist() == plain.ranks[~cold].tolist()
    elif cold_targets == "miss":
        assert metrics.ranks[cold].isinf().all()
        assert metrics.ranks[~cold].tolist() == plain.ranks[~cold].tolist()
        assert all(math.isfinite(value) for value in metrics.summary().values())
    else:
        assert metrics.ranks.tolist() == plain.ranks.tolist()


def test_all_protocols_come_out_of_one_pass(small_data):
    model, passes = coarse_model(small_data.n_items), []
    plain = model.last_states
    model.last_states = lambda *inputs: passes.append(1) or plain(*inputs)
    protocols = {"one": Protocol(seen="mask"), "two": Protocol(ties="pessimistic", cutoffs=(5,)), "three": Protocol()}
    together = evaluate_many(model, small_data, "test", protocols, batch_size=10)
    assert len(passes) == small_data.n_users / 10
    for name, protocol in protocols.items():
        alone = evaluate_many(model, small_data, "test", {name: protocol}, batch_size=64)[name]
        assert together[name].ranks.tolist() == alone.ranks.tolist()


def test_every_field_of_a_protocol_is_in_its_hash():
    changed = {
        "split": "time", "trained_on": "train", "cold_targets": "miss", "candidates": "sampled", "negatives": 7,
        "negatives_from": "popularity", "negatives_exclude": "history", "negatives_seed": 1, "seen": "mask",
        "ties": "optimistic", "cutoffs": (10, 20),
    }  # fmt: skip
    assert set(changed) == set(Protocol.model_fields)
    hashes = {Protocol().hash} | {Protocol(**{name: value}).hash for name, value in changed.items()}
    assert len(hashes) == len(changed) + 1
    assert EvaluateConfig(batch_size=3).protocol.hash == Protocol().hash


def test_presets_carry_the_names_of_the_papers():
    wanted = {
        "seralm", "elephant-100", "elephant-full", "lmrec-public", "lmrec-inhouse", "unisrec", "gsasrec", "esasrec",
        "recbole",
    }  # fmt: skip
    assert wanted <= set(PRESETS)
    assert preset("elephant-100").candidates == "sampled"
    with pytest.raises(UserError, match="there are: seralm"):
        preset("elefant")
