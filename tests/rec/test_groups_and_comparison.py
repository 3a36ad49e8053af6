"""Breakdowns against loops over users, and the paired bootstrap on differences that are known."""

import pytest
import torch

from rec.batches import fit_counts
from rec.breakdown import break_down, groups
from rec.compare import compare
from rec.config import EvaluateConfig
from rec.evaluation import Metrics, evaluate
from rec.item_encoder import IDTable
from rec.models.sasrec import SASRec, SASRecConfig
from rec.runtime.errors import UserError


@pytest.mark.parametrize("part", ["valid", "test"])
def test_groups_equal_a_loop_over_users(small_data, part):
    found = groups(small_data, part)
    users, ends = small_data.instances(part)
    trained = small_data.sequence[small_data.part == 0].tolist()
    popularity = sorted(set(range(small_data.n_items + 1)), key=lambda item: (-trained.count(item), item))
    third, before = {}, 0
    for item in popularity:
        third[item] = min(2, 3 * before // len(trained))
        before += trained.count(item)
    for row, (user, end) in enumerate(zip(users.tolist(), ends.tolist(), strict=True)):
        history = small_data.sequence[small_data.offsets[user] : end].tolist()
        target = small_data.sequence[end].item()
        assert found["repeat"][row] == (target in history) == (not found["new"][row])
        assert found["cold"][row] == (target not in trained) == (not found["warm"][row])
        assert [bool(found[name][row]) for name in ("head", "middle", "tail")] == [third[target] == n for n in range(3)]
    assert found["repeat"].any()
    assert found["new"].any()
    lengths = torch.stack([found[name] for name in ("short", "medium", "long")])
    assert (lengths.sum(0) == 1).all()


def test_figures_of_groups_average_to_the_whole(small_data):
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(dim=16, max_length=8), IDTable(small_data.n_items, 16))
    metrics = evaluate(model, small_data, "test", EvaluateConfig())
    found = break_down(metrics, small_data, "test")
    for names in (("repeat", "new"), ("head", "middle", "tail")):
        own = [found[name] for name in names if name in found]
        assert sum(group["instances"] for group in own) == len(metrics.ranks)
        total = sum(group["instances"] * group["NDCG@10"] for group in own) / len(metrics.ranks)
        assert total == pytest.approx(metrics["NDCG@10"])


def of_ranks(ranks: list[float]) -> Metrics:
    return Metrics(torch.tensor(ranks, dtype=torch.double), (10,), torch.arange(len(ranks)), torch.arange(len(ranks)))


def test_the_same_run_differs_from_itself_by_nothing():
    ranks = of_ranks([1.0, 4.0, 30.0, 11.0] * 20)
    row = compare(ranks, ranks)["NDCG@10"]
    assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)


def test_one_user_is_no_comparison():
    with pytest.raises(UserError, match="one user in common"):
        compare(of_ranks([1.0]), of_ranks([2.0]))


def test_a_clear_difference_is_found_and_has_a_sign():
    better, worse = of_ranks([2.0, 3.0] * 100), of_ranks([20.0, 5.0] * 100)
    row = compare(better, worse)["HR@10"]
    assert row["difference"] == pytest.approx(0.5)
    assert 0.4 < row["low"] < 0.5 < row["high"] < 0.6
    assert row["p"] == pytest.approx(2 / 10_001)  # never 0: the difference itself counts as one more draw
    assert compare(worse, better)["HR@10"]["difference"] == pytest.approx(-0.5)


def test_the_interval_is_that_of_a_paired_difference():
    """The bootstrap's spread of a mean must be the standard error of the paired differences."""
    torch.manual_seed(0)
    one, other = (torch.randint(1, 30, (400,)).double() for _ in range(2))
    metrics = [Metrics(ranks, (10,), torch.arange(400), torch.arange(400)) for ranks in (one, other)]
    row = compare(*metrics)["MRR"]
    differences = 1 / one - 1 / other
    error = differences.std().item() / 20
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_instances_of_one_user_count_as_one_draw():
    """Every user's instance four times over is no more evidence than once."""
    torch.manual_seed(0)
    one, other = (torch.randint(1, 30, (400,)).double() for _ in range(2))
    users = torch.arange(400)
    for metric in ("HR@10", "MRR"):
        plain = [Metrics(ranks, (10,), users, users) for ranks in (one, other)]
        repeated = [Metrics(ranks.repeat(4), (10,), torch.arange(1600), users.repeat(4)) for ranks in (one, other)]
        value = plain[0].values()[metric]
        assert plain[0].summary()[f"{metric}_se"] == pytest.approx(value.std().item() / 20)
        assert repeated[0].summary()[f"{metric}_se"] == pytest.approx(value.std().item() / 20)
        once, often = compare(*plain)[metric], compare(*repeated)[metric]
        assert often["high"] - often["low"] == pytest.approx(once["high"] - once["low"], rel=1e-6)


def test_runs_are_compared_on_the_instances_that_they_share():
    """Of two runs that drop different cold targets."""
    ranks, users = torch.tensor([1.0, 2.0, 30.0, 4.0], dtype=torch.double), torch.arange(4)
    one = Metrics(ranks, (10,), users, users)
    other = Metrics(ranks + 1, (10,), users, users)
    expected = compare(one.of(torch.tensor([1, 2])), other.of(torch.tensor([1, 2])))
    assert compare(one.of(torch.tensor([0, 1, 2])), other.of(torch.tensor([3, 2, 1]))) == expected
    with pytest.raises(UserError, match="no target in common"):
        compare(one.of(torch.tensor([0, 1])), other.of(torch.tensor([2, 3])))


def test_what_is_popular_is_what_was_trained_on(small_data):
    """Popularity after training on the validation items counts these too."""
    counts = fit_counts(small_data, "train+valid")
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    head = order[3 * before < counts.sum()]
    expected = torch.isin(small_data.targets("test"), head)
    assert torch.equal(groups(small_data, "test", "train+valid")["head"], expected)
    assert not torch.equal(groups(small_data, "test")["head"], expected)
