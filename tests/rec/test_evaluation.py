"""Full ranking against a naive loop over users and items."""

import math
from pathlib import Path

import pytest
import torch

from rec import ranking
from rec.config import EvaluateConfig
from rec.evaluation import evaluate, evaluate_many
from rec.item_encoder import IDTable
from rec.models.sasrec import SASRec, SASRecConfig
from rec.negatives import draw_negatives
from rec.protocol import PRESETS, Protocol, preset
from rec.runtime.config import hash_of
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
    model.scores = lambda states, out=None, table=None: torch.div((plain(states) * 60).round(), 4, out=out)
    return model


@pytest.mark.parametrize("seen", ["rank", "mask"])
@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize(("scored", "compared"), [(256, 32), (5, 2)])
def test_full_ranking_equals_a_naive_loop(small_data, monkeypatch, seen, split, scored, compared):
    monkeypatch.setattr(ranking, "SCORED_ROWS", scored)
    monkeypatch.setattr(ranking, "COMPARED_ROWS", compared)
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
    model.scores = lambda states, out=None, table=None: torch.zeros(len(states), small_data.n_items)
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


def test_nothing_but_cold_targets_leaves_nothing_to_rank(small_data, monkeypatch):
    monkeypatch.setitem(vars(small_data), "train_counts", torch.zeros_like(small_data.train_counts))
    model = coarse_model(small_data.n_items)
    with pytest.raises(UserError, match=r"all 40 test items of .* are cold"):
        evaluate_many(model, small_data, "test", {"one": Protocol(), "other": preset("elephant-full")})


def test_a_single_user_has_no_standard_error(small_data):
    found = evaluate(coarse_model(small_data.n_items), small_data, "test", EvaluateConfig(), instances=[3]).summary()
    assert found["NDCG@10_se"] is None
    assert found["NDCG@10"] >= 0


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


def test_every_field_that_decides_something_is_in_the_hash_and_no_other():
    everywhere = {
        "split": "time", "trained_on": "train", "cold_targets": "miss", "ties": "optimistic", "cutoffs": (10, 20),
    }  # fmt: skip
    changed = {
        ("all", "rank"): {**everywhere, "seen": "mask", "candidates": "sampled"},
        ("all", "mask"): {**everywhere, "repeated_targets": "miss"},
        ("sampled", "rank"): {
            **everywhere, "negatives": 7, "negatives_from": "popularity", "negatives_exclude": "history",
            "negatives_seed": 1,
        },
    }  # fmt: skip
    assert {name for fields in changed.values() for name in fields} == set(Protocol.model_fields)
    defaults, different = Protocol().model_dump(), {**changed["all", "rank"], **changed["sampled", "rank"]}
    different |= changed["all", "mask"]
    for (candidates, seen), fields in changed.items():
        base = Protocol(candidates=candidates, seen=seen)
        hashes = {base.hash} | {base.model_copy(update={name: value}).hash for name, value in fields.items()}
        assert len(hashes) == len(fields) + 1
        for name in set(defaults) - set(fields) - {"candidates", "seen"}:
            assert base.model_copy(update={name: different[name]}).hash == base.hash, name
            assert name not in base.described()
    assert Protocol(candidates="sampled", seen="mask").hash == Protocol(candidates="sampled").hash
    assert EvaluateConfig(batch_size=3).protocol.hash == Protocol().hash


def test_the_protocol_of_a_run_says_what_it_was_trained_on(small_data, monkeypatch):
    plain = Protocol().of_run(small_data, "train")
    assert (plain.split, plain.trained_on) == ("leave-one-out", "train")
    assert plain.hash != Protocol().of_run(small_data, "train+valid").hash
    assert preset("hstu").of_run(small_data, "train").trained_on == "train"
    monkeypatch.setattr(Protocol, "METRICS_VERSION", 2)
    assert Protocol().of_run(small_data, "train").hash != hash_of(plain.described() | {"metrics_version": 1})
    assert plain.described()["metrics_version"] == 2


def test_presets_are_what_the_documentation_says():
    """Its table says nothing of the cutoffs, nor of the split but for the one that is not leave-one-out."""
    text = (Path(__file__).parents[2] / "docs" / "recommenders.md").read_text()
    table = text.split("| preset |")[1].split("\n\n")[0].splitlines()[2:]
    words = {
        "all": {"candidates": "all"},
        "target + 100 uniform": {"candidates": "sampled", "negatives": 100, "negatives_from": "uniform"},
    }
    seen = {"ranked": "rank", "left out": "mask", "-": "rank"}
    cold = {"ranked": "rank", "dropped": "drop", "count as misses": "miss"}
    told = {}
    for line in table:
        names, trained_on, candidates, seen_items, cold_targets, ties = (cell.strip() for cell in line.split("|")[1:-1])
        trained_on, _, others = trained_on.partition(", ")
        for name in names.replace("`", "").split(", "):
            told[name] = {
                "split": "users" if others == "other users" else "leave-one-out",
                "trained_on": trained_on,
                **words[candidates],
                "seen": seen[seen_items],
                "cold_targets": cold[cold_targets],
                "ties": ties,
            }
    assert told.keys() == PRESETS.keys()
    cutoffs = {"recbole": (5, 10, 20), "unisrec": (10, 50)}
    for name, fields in told.items():
        assert preset(name) == Protocol(**fields, cutoffs=cutoffs.get(name, (10,))), name


def test_presets_carry_the_names_of_the_papers():
    wanted = {
        "seralm", "elephant-100", "elephant-full", "lmrec-public", "lmrec-inhouse", "unisrec", "gsasrec", "esasrec",
        "recbole",
    }  # fmt: skip
    assert wanted <= set(PRESETS)
    with pytest.raises(UserError, match="there are: seralm"):
        preset("elefant")


def test_a_masked_target_can_count_as_a_miss(small_data):
    model = coarse_model(small_data.n_items)
    kept = evaluate(model, small_data, "test", EvaluateConfig(seen="mask"))
    missed = evaluate(model, small_data, "test", EvaluateConfig(seen="mask", repeated_targets="miss"))
    repeated = []
    for user in range(small_data.n_users):
        sequence = small_data.sequence[small_data.offsets[user] : small_data.offsets[user + 1]].tolist()
        repeated.append(sequence[-1] in sequence[:-1])
    assert 0 < sum(repeated) < len(repeated)
    assert missed.ranks.isinf().tolist() == repeated
    assert missed.ranks[~torch.tensor(repeated)].tolist() == kept.ranks[~torch.tensor(repeated)].tolist()
    ranked = evaluate(model, small_data, "test", EvaluateConfig(repeated_targets="miss"))
    assert ranked.ranks.isfinite().all()


@pytest.mark.parametrize("ties", ["mean", "optimistic", "pessimistic"])
@pytest.mark.parametrize("seen", ["rank", "mask"])
def test_without_ranks_beyond_the_cutoffs_the_figures_are_the_same(small_data, monkeypatch, seen, ties):
    """And many instances are not ranked at all; vectors of few values make ties at the edge of what is sure."""
    monkeypatch.setattr(ranking, "POPULAR", 20)
    torch.manual_seed(3)
    model = SASRec(SASRecConfig(dim=4, heads=1, max_length=6), IDTable(small_data.n_items, 4)).eval()
    model.items.ids.weight.data = torch.randint(-1, 2, (small_data.n_items + 1, 4)).float()
    config = EvaluateConfig(seen=seen, ties=ties, cutoffs=(1, 3, 10), batch_size=7)
    scored, plain = [], model.scores
    model.scores = lambda states, **options: scored.append(len(states)) or plain(states, **options)
    whole = evaluate(model, small_data, "test", config)
    assert sum(scored) == small_data.n_users
    scored.clear()
    part = evaluate(model, small_data, "test", config, complete=False)
    assert sum(scored) < small_data.n_users or seen == "mask"  # of whom nearly all items are seen
    wanted = {name: value for name, value in whole.summary().items() if name not in ("MRR", "MRR_se")}
    assert part.summary() == wanted
    assert part.ranks.tolist() == [rank if rank <= 10 else math.inf for rank in whole.ranks.tolist()]


def test_under_autocast_scores_are_still_compared_in_float32(small_data, monkeypatch):
    """bfloat16 has 8 bits: what it rounds to a tie, or to the other side, is more than any margin for float32."""
    monkeypatch.setattr(ranking, "POPULAR", 20)
    torch.manual_seed(3)
    model = SASRec(SASRecConfig(dim=16, heads=1, max_length=6), IDTable(small_data.n_items, 16)).eval()
    found = {}
    for complete in (True, False):
        kept, plain = [], model.last_states
        model.last_states = lambda *inputs, own=plain, kept=kept: kept.append(own(*inputs)) or kept[-1]
        with torch.autocast("cpu", torch.bfloat16):
            found[complete] = evaluate(model, small_data, "test", EvaluateConfig(cutoffs=(1, 10)), complete=complete)
        model.last_states = plain
        states = torch.cat(kept).float()
    table, targets = model.items.table()[1:].detach(), small_data.targets("test") - 1
    lengths = small_data.instances("test")[1] - small_data.offsets[:-1]
    order = lengths.argsort(stable=True)  # as evaluation reads them
    exact = (states.double() @ table.double().T)[order.argsort()]
    ranks = 1 + (exact > exact.gather(1, targets[:, None])).sum(1)
    assert found[True].ranks.tolist() == ranks.tolist()
    assert found[False].ranks.tolist() == [rank if rank <= 10 else math.inf for rank in ranks.tolist()]


def test_item_vectors_are_made_once_an_evaluation(small_data):
    model, made = coarse_model(small_data.n_items), []
    plain = model.items.table
    model.items.table = lambda: made.append(1) or plain()
    del model.scores
    evaluate(model, small_data, "test", EvaluateConfig(batch_size=4))
    assert len(made) == 1


def test_a_diverged_model_is_known_without_ranks_too(small_data):
    model = coarse_model(small_data.n_items)
    torch.nn.init.constant_(model.norm.bias, float("nan"))
    with pytest.raises(UserError, match="diverged"):
        evaluate(model, small_data, "test", EvaluateConfig(), complete=False)
