"""Every loss against a loop over targets and negatives."""

import math

import pytest
import torch
from torch.nn import functional as F

from rec.linear_cross_entropy import linear_cross_entropy
from rec.losses import LossConfig, NegativeSampling, gbce_beta, make_loss

N, M, D = 23, 9, 5


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(M, D, requires_grad=True), torch.randn(N, D, requires_grad=True), torch.randint(N, (M,))


class Fixed(NegativeSampling):
    """Negatives that the test chose, with a target among them."""

    def draw(self, targets):
        return self.chosen


def with_negatives(name: str, negatives: torch.Tensor, **options) -> Fixed:
    config = LossConfig(name=name, negatives=negatives.shape[-1], **options)
    loss = Fixed(config, torch.arange(1, N + 1).float())
    loss.chosen = negatives
    return loss


def score(states, table, row, item) -> float:
    return float(states[row].detach() @ table[item].detach())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["sampled-softmax", "bce", "gbce", "bpr"])
def test_losses_equal_their_formulas(inputs, name, shared):
    states, table, targets = inputs
    negatives = torch.randint(N, (4,) if shared else (M, 4))
    negatives[..., 0] = targets[3]  # a negative that is the target itself, for row 3 at least
    totals, pairs = [], 0
    for row, target in enumerate(targets.tolist()):
        own = score(states, table, row, target)
        drawn = (negatives if shared else negatives[row]).tolist()
        others = [score(states, table, row, item) for item in drawn if item != target]
        if name == "sampled-softmax":
            totals.append(-math.log(math.exp(own) / (math.exp(own) + sum(map(math.exp, others)))))
        elif name == "bpr":
            totals.append(sum(-math.log(sigmoid(own - other)) for other in others))
            pairs += len(others)
        else:
            # Of gSASRec's Eq. 19 with t = 0.75, multiplied out: 1 - t (1 - k / (N - 1)).
            beta = 1 - 0.75 * (1 - 4 / (N - 1)) if name == "gbce" else 1.0
            positive = beta * math.log(sigmoid(own))
            totals.append(-(positive + sum(math.log(1 - sigmoid(other)) for other in others)) / 5)
    expected = sum(totals) / (pairs if name == "bpr" else M)
    found = with_negatives(name, negatives, shared=shared)(states, table, targets)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(found, (states, table)))


def test_softmax_over_all_items_is_the_full_one(inputs):
    states, table, targets = inputs
    found = with_negatives("sampled-softmax", torch.arange(N))(states, table, targets)
    torch.testing.assert_close(found, linear_cross_entropy(states, table, targets))


def test_log_q_makes_the_sampled_softmax_estimate_the_full_one(inputs):
    """Importance sampling: with many draws from any proposal the corrected denominator tends to the full one."""
    states, table, targets = inputs
    full = linear_cross_entropy(states, table, targets).item()
    for sampling in ("uniform", "popularity"):
        errors = {}
        for log_q in (True, False):
            config = LossConfig(name="sampled-softmax", negatives=60_000, sampling=sampling, log_q=log_q)
            loss = make_loss(config, torch.arange(1, N + 1).float() ** 2)
            errors[log_q] = abs(loss(states, table, targets).item() - full)
        assert errors[True] < 0.1 * errors[False]


def test_gbce_is_bce_without_calibration_and_with_all_items_as_negatives():
    assert gbce_beta(8, N, 0.0) == pytest.approx(1.0)
    assert gbce_beta(N - 1, N, 0.75) == pytest.approx(1.0)
    alpha = 8 / (N - 1)
    assert gbce_beta(8, N, 1.0) == pytest.approx(alpha)


def test_extreme_scores_stay_finite():
    states, table = torch.tensor([[200.0], [-200.0]], requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    for name in ("sampled-softmax", "bce", "gbce", "bpr"):
        loss = with_negatives(name, torch.tensor([1, 2]))(states, table, torch.tensor([0, 0]))
        assert torch.isfinite(loss)
        assert torch.isfinite(torch.autograd.grad(loss, states)[0]).all()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sampling", ["uniform", "popularity", "in-batch"])
def test_negatives_follow_their_distribution(sampling, shared):
    torch.manual_seed(1)
    popularity = torch.tensor([0.0, 1.0, 2.0, 5.0])
    targets = torch.tensor([1, 1, 1, 3])
    rows = 1 if shared else len(targets)
    config = LossConfig(name="bce", negatives=20_000 // rows, sampling=sampling, shared=shared)
    drawn = NegativeSampling(config, popularity).draw(targets)
    assert drawn.shape == ((config.negatives,) if shared else (4, config.negatives))
    found = torch.bincount(drawn.flatten(), minlength=4).double() / drawn.numel()
    expected = {
        "uniform": [0.25] * 4,
        "popularity": [0, 1 / 8, 2 / 8, 5 / 8],
        "in-batch": [0, 3 / 4, 0, 1 / 4],
    }[sampling]
    assert found.tolist() == pytest.approx(expected, abs=0.02)


def test_bf16_autocast_is_close_and_keeps_float32_gradients(inputs):
    states, table, targets = inputs
    exact = linear_cross_entropy(states, table, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rough = linear_cross_entropy(states, table, targets)
    assert rough.item() == pytest.approx(exact.item(), rel=0.02)
    for ours, theirs in zip(
        torch.autograd.grad(rough, (states, table)), torch.autograd.grad(exact, (states, table)), strict=True
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.02)


def test_the_loss_of_logits_near_the_shift_is_the_plain_one():
    """Both ways through exp, with and without the maximum subtracted, agree with torch."""
    torch.manual_seed(3)
    for scale in (0.1, 3.0, 30.0):
        states, table = torch.randn(6, 4) * scale, torch.randn(50, 4) * scale
        targets = torch.randint(50, (6,))
        plain = F.cross_entropy(states.double() @ table.double().T, targets)
        assert linear_cross_entropy(states, table, targets).item() == pytest.approx(plain.item(), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", ["sampled-softmax", "bpr"])
def test_gradients_are_the_same_bits_every_time_with_several_threads(name):
    """Rows of the table that are gathered often: indexing adds up what comes back for them in any order."""
    torch.manual_seed(0)
    states, table = torch.randn(512, 128), torch.randn(40, 128, requires_grad=True)
    targets, threads = torch.randint(4, (512,)), torch.get_num_threads()
    loss = make_loss(LossConfig(name=name, negatives=64), torch.ones(40))
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(60):
            torch.manual_seed(1)
            found.append(torch.autograd.grad(loss(states, table, targets), table)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(own, found[0]) for own in found)
