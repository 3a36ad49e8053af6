"""The objective against enumeration: every text of a tiny language, its exact probability, the exact gradients."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from align.logprobs import scored
from align.objective import (
    draw_log_ratios,
    effective_sample_fraction,
    importance_weights,
    log_ratios,
    mean_ratio,
    mismatch_kl,
    policy_loss,
    recommender_loss,
    reward_weights,
    row_weights,
    sampled_kl,
    scaled,
)

VOCABULARY, LENGTH, EOS = 3, 3, 0
ALPHA = 0.37


class TinyLM(torch.nn.Module):
    """One free logit vector for every prefix; a text ends with EOS or at the maximum length."""

    def __init__(self, seed: int, length: int = LENGTH) -> None:
        super().__init__()
        prefixes = [p for n in range(length) for p in itertools.product(range(1, VOCABULARY), repeat=n)]
        self.row = {prefix: row for row, prefix in enumerate(prefixes)}
        logits = torch.randn(len(prefixes), VOCABULARY, generator=torch.Generator().manual_seed(seed))
        self.logits = torch.nn.Parameter(logits.double())

    def token_logprobs(self, text: tuple[int, ...]) -> Tensor:
        log_p = self.logits.log_softmax(-1)
        return torch.stack([log_p[self.row[text[:t]], token] for t, token in enumerate(text)])

    def token_logits(self, text: tuple[int, ...]) -> Tensor:
        return torch.stack([self.logits[self.row[text[:t]]] for t in range(len(text))])


def all_texts(length: int = LENGTH) -> list[tuple[int, ...]]:
    ended = [(*p, EOS) for n in range(length) for p in itertools.product(range(1, VOCABULARY), repeat=n)]
    return ended + list(itertools.product(range(1, VOCABULARY), repeat=length))


@pytest.fixture
def world() -> tuple[TinyLM, TinyLM, list[tuple[int, ...]], Tensor]:
    """A policy, its original, all texts, and log p(y|x,s) of each."""
    texts = all_texts()
    log_p_y = torch.rand(len(texts), generator=torch.Generator().manual_seed(7)).double().log()
    return TinyLM(0), TinyLM(1), texts, log_p_y


def padded(lm: TinyLM, texts: list[tuple[int, ...]]) -> tuple[Tensor, Tensor]:
    rows = [lm.token_logprobs(text) for text in texts]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), mask.detach()


def padded_kl(policy: TinyLM, original: TinyLM, texts: list[tuple[int, ...]]) -> Tensor:
    rows = [
        scored(policy.token_logits(text), torch.tensor(text), original.token_logits(text).detach())[1] for text in texts
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def exact_gradient(policy: TinyLM, original: TinyLM, texts: list, log_p_y: Tensor, alpha: float) -> Tensor:
    """∇ of log Σ_s p(y|x,s) p(s|x) + α Σ_s p(s|x) (log p_orig(s|x) - log p(s|x)), by autograd through the sums."""
    log_p = torch.stack([policy.token_logprobs(text).sum() for text in texts])
    log_orig = torch.stack([original.token_logprobs(text).sum() for text in texts]).detach()
    likelihood = torch.logsumexp(log_p_y + log_p, 0)
    minus_kl = (log_p.exp() * (log_orig - log_p)).sum()
    return torch.autograd.grad(likelihood + alpha * minus_kl, policy.logits)[0]


def test_the_tiny_language_is_a_distribution(world):
    policy, _, texts, _ = world
    total = sum(policy.token_logprobs(text).sum().exp() for text in texts)
    assert total.item() == pytest.approx(1)


@pytest.mark.parametrize("alpha", [0.0, ALPHA, 5.0])
@pytest.mark.parametrize("baseline", ["none", "one"])
@pytest.mark.parametrize("kl", ["sampled", "exact"])
@pytest.mark.parametrize("stale", [False, True])
def test_expected_gradient_is_the_exact_one(world, alpha, baseline, kl, stale):
    """Eq. 6 + α Eq. 7: each text's own loss, weighted by its exact probability, gives the exact gradient.

    Also where the texts are drawn from an older policy, with importance weights.
    """
    policy, original, texts, log_p_y = world
    logprobs, mask = padded(policy, texts)
    reference = padded(original, texts)[0].detach()
    token_kl = padded_kl(policy, original, texts) if kl == "exact" else [None] * len(texts)
    log_p_y_given_x = torch.logsumexp(log_p_y + (logprobs * mask).sum(1), 0).detach()
    weights = reward_weights(log_p_y[:, None], log_p_y_given_x.expand_as(log_p_y), baseline)[:, 0]
    sampling = padded(TinyLM(5), texts)[0].detach() if stale else logprobs.detach()
    importance = importance_weights(log_ratios(logprobs.detach(), sampling, mask), cap=1e9)
    weights = importance * weights
    probabilities = (sampling * mask).sum(1).exp()
    losses = [
        policy_loss(
            logprobs[i : i + 1], reference[i : i + 1], mask[i : i + 1], weights[i : i + 1], alpha, 1,
            None if token_kl[i] is None else token_kl[i : i + 1], importance[i : i + 1],
        )
        for i in range(len(texts))
    ]  # fmt: skip
    found = -torch.autograd.grad((probabilities * torch.stack(losses)).sum(), policy.logits)[0]
    expected = exact_gradient(policy, original, texts, log_p_y, alpha)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_leaving_one_out_of_a_group_keeps_the_expectation(world):
    """Every pair of texts that one (x, y) can get, by its probability."""
    policy, original, texts, log_p_y = world
    logprobs, mask = padded(policy, texts)
    reference = padded(original, texts)[0].detach()
    probabilities = (logprobs * mask).sum(1).exp().detach()
    log_p_y_given_x = torch.logsumexp(log_p_y + probabilities.log(), 0)[None]
    total = 0.0
    for pair in itertools.product(range(len(texts)), repeat=2):
        rows = list(pair)
        weights = reward_weights(log_p_y[None, rows], log_p_y_given_x, "leave-one-out")[0]
        loss = policy_loss(logprobs[rows], reference[rows], mask[rows], weights, ALPHA, 2)
        total = total + probabilities[rows].prod() * loss
    found = -torch.autograd.grad(total, policy.logits)[0]
    torch.testing.assert_close(found, exact_gradient(policy, original, texts, log_p_y, ALPHA), rtol=1e-9, atol=1e-12)


def test_the_bias_of_the_groups_own_mean_vanishes_with_its_size(world):
    """p(y|x) as the mean over k texts: the expected weight of a text tends to the exact one as 1/k."""
    policy, _, texts, log_p_y = world
    logprobs, mask = padded(policy, texts)
    probabilities = (logprobs * mask).sum(1).exp().detach()
    exact = (log_p_y - torch.logsumexp(log_p_y + probabilities.log(), 0)).exp()
    generator, errors = torch.Generator().manual_seed(2), []
    for k in (1, 8, 64):
        drawn = torch.multinomial(probabilities, 40_000 * k, replacement=True, generator=generator).view(-1, k)
        weights = reward_weights(log_p_y[drawn], torch.zeros(len(drawn)), denominator="group")
        torch.testing.assert_close(weights.mean(1), torch.ones(len(drawn)).double())
        mean = torch.stack([weights[drawn == text].mean() for text in range(len(texts))])
        errors.append((probabilities * (mean - exact).abs()).sum().item())
    assert errors[1] < errors[0] / 4
    assert errors[2] < errors[1] / 4


def test_a_text_that_two_samples_share_is_one_row_with_the_sum_of_their_weights(world):
    """Item a is in both histories, b in the first, c in the second: every text of each, by its probability."""
    policy, original, texts, _ = world
    logprobs, mask = padded(policy, texts)
    reference = padded(original, texts)[0].detach()
    log_p = (logprobs * mask).sum(1)
    # log p(y|x,s) of the first sample by the texts of a and b, and of the second by those of a and c.
    likelihoods = torch.rand(2, len(texts), len(texts), generator=torch.Generator().manual_seed(4)).double().log()
    log_p_y = torch.stack([torch.logsumexp((table + log_p[:, None] + log_p).flatten(), 0) for table in likelihoods])
    minus_kl = (log_p.exp() * ((reference - logprobs) * mask).sum(1)).sum()
    # Two texts in each of two samples, all of one policy.
    expected = torch.autograd.grad(log_p_y.mean() + 2 * ALPHA * minus_kl, policy.logits, retain_graph=True)[0]
    holds = torch.tensor([0, 1, 0, 2]), torch.tensor([0, 0, 1, 1])
    total = 0.0
    for a, b, c in itertools.product(range(len(texts)), repeat=3):
        rows = [a, b, c]
        weights = (torch.stack([likelihoods[0, a, b], likelihoods[1, a, c]]) - log_p_y.detach()).exp()
        weights, shares = row_weights(weights, torch.ones(2).double(), *holds, 3)
        loss = policy_loss(logprobs[rows], reference[rows], mask[rows], weights, ALPHA, 2, shares=shares)
        total = total + log_p[rows].sum().exp().detach() * loss
    torch.testing.assert_close(-torch.autograd.grad(total, policy.logits)[0], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("baseline", ["none", "one", "leave-one-out"])
def test_monte_carlo_gradient_converges(world, baseline):
    """Batches of really sampled texts: the mean over many batches is within five standard errors everywhere."""
    policy, original, texts, log_p_y = world
    logprobs, mask = padded(policy, texts)
    reference = padded(original, texts)[0].detach()
    probabilities = (logprobs * mask).sum(1).exp().detach()
    log_p_y_given_x = torch.logsumexp(log_p_y + probabilities.log(), 0)
    generator = torch.Generator().manual_seed(3)
    estimates = []
    for _ in range(1500):
        drawn = torch.multinomial(probabilities, 8, replacement=True, generator=generator)
        weights = reward_weights(log_p_y[drawn][:, None], log_p_y_given_x.expand(8), baseline)[:, 0]
        loss = policy_loss(logprobs[drawn], reference[drawn], mask[drawn], weights, ALPHA, 8)
        estimates.append(-torch.autograd.grad(loss, policy.logits, retain_graph=True)[0])
    estimates = torch.stack(estimates)
    standard_error = estimates.std(0) / len(estimates) ** 0.5
    expected = exact_gradient(policy, original, texts, log_p_y, ALPHA)
    assert standard_error.max() < 0.05 * expected.abs().max()
    assert ((estimates.mean(0) - expected).abs() < 5 * standard_error + 1e-9).all()


def test_the_naive_kl_gradient_would_be_zero(world):
    """Why the KL term is not differentiated through the sampled difference: its expectation vanishes."""
    policy, original, texts, _ = world
    logprobs, mask = padded(policy, texts)
    reference = padded(original, texts)[0].detach()
    probabilities = (logprobs * mask).sum(1).exp().detach()
    naive = (probabilities * ((reference - logprobs) * mask).sum(1)).sum()
    gradient = torch.autograd.grad(naive, policy.logits)[0]
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)


def test_several_texts_of_one_sample_share_its_weight(world):
    """Two fresh items of one (x, y): log p(s|x) is the sum over both texts."""
    policy, original, texts, _ = world
    logprobs, mask = padded(policy, texts[:4])
    reference = padded(original, texts[:4])[0].detach()
    weights = torch.tensor([2.0, 2.0, -1.0, -1.0]).double()
    together = policy_loss(logprobs, reference, mask, weights, 0.0, n_samples=2)
    by_hand = -(2.0 * (logprobs * mask)[:2].sum() - 1.0 * (logprobs * mask)[2:].sum()) / 2
    torch.testing.assert_close(together, by_hand)


def test_padding_never_contributes(world):
    policy, original, texts, _ = world
    logprobs, mask = padded(policy, texts)
    reference = padded(original, texts)[0].detach()
    weights = torch.ones(len(texts)).double()
    clean = policy_loss(logprobs, reference, mask, weights, ALPHA, len(texts))
    noise = 1e3 * (1 - mask)
    noisy = policy_loss(logprobs + noise, reference - noise, mask, weights, ALPHA, len(texts))
    torch.testing.assert_close(clean, noisy)


def test_weights_by_hand():
    with_text, without = torch.tensor([[0.2], [0.4], [0.9]]).log(), torch.tensor([0.1, 0.4, 0.1]).log()

    def weights(*args, **kwargs):
        return reward_weights(with_text, without, *args, **kwargs)[:, 0]

    torch.testing.assert_close(weights(), torch.tensor([2.0, 1.0, 9.0]))
    torch.testing.assert_close(weights("one"), torch.tensor([1.0, 0.0, 8.0]))
    torch.testing.assert_close(weights("leave-one-out"), torch.tensor([2 - 5.0, 1 - 5.5, 9 - 1.5]))
    torch.testing.assert_close(weights(max_ratio=4), torch.tensor([2.0, 1.0, 4.0]))


def test_weights_of_groups_by_hand():
    with_text, without = torch.tensor([[0.2, 0.6], [0.3, 0.1]]).log(), torch.tensor([0.1, 0.2]).log()
    found = reward_weights(with_text, without, "leave-one-out")
    torch.testing.assert_close(found, torch.tensor([[2 - 6.0, 6 - 2.0], [1.5 - 0.5, 0.5 - 1.5]]))
    found = reward_weights(with_text, without, denominator="group")
    torch.testing.assert_close(found, torch.tensor([[0.5, 1.5], [1.5, 0.5]]))


@pytest.mark.parametrize("samples", range(2, 9))
def test_equal_rewards_weigh_nothing_and_rounding_is_no_reward(samples):
    torch.manual_seed(samples)
    with_text = torch.randn(50, 1).expand(-1, samples)
    found = reward_weights(with_text, torch.randn(50), "leave-one-out")
    assert not found.any()
    assert not scaled(found).any()


def test_importance_weights_are_of_all_texts_of_a_sample_and_capped():
    """The second text is in two samples."""
    ratios, texts, samples = torch.tensor([2.0, 1.5, 0.5]), torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1, 2])
    of_draws = draw_log_ratios(ratios.log(), texts, samples, 3)
    importance = importance_weights(of_draws, cap=9)
    torch.testing.assert_close(importance, torch.tensor([3.0, 1.5, 0.5]))
    torch.testing.assert_close(importance_weights(of_draws, cap=2), torch.tensor([2.0, 1.5, 0.5]))
    weights, shares = row_weights(torch.tensor([1.0, -2.0, 4.0]), importance, texts, samples, 3)
    torch.testing.assert_close(weights, torch.tensor([3.0, 0.0, 2.0]))
    torch.testing.assert_close(shares, torch.tensor([3.0, 4.5, 0.5]))


def test_mismatch_is_zero_between_equals_and_never_negative():
    logprobs, mask = -torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(3, 4)
    assert mismatch_kl(logprobs, logprobs, mask).tolist() == [0, 0, 0]
    moved = logprobs + torch.tensor([0.1, -0.1, 0.2, -0.3])
    mask[2, 3] = 0
    by_hand = [
        sum(math.exp(d) - 1 - d for d in of_text) for of_text in ((0.1, -0.1, 0.2, -0.3),) * 2 + ((0.1, -0.1, 0.2),)
    ]
    assert mismatch_kl(moved, logprobs, mask).tolist() == pytest.approx(by_hand, rel=1e-5)


def test_recommender_ascends_the_log_likelihood():
    log_p = torch.tensor([0.5, 0.125]).log()
    assert recommender_loss(log_p).item() == pytest.approx(-(log_p[0] + log_p[1]).item() / 2)


def test_stale_texts_give_the_present_kl(world):
    """Texts drawn from an older policy, importance-weighted, estimate KL(p || p_orig) of today's."""
    policy, original, texts, _ = world
    old, (logprobs, mask) = TinyLM(5), padded(policy, texts)
    sampling, reference = padded(old, texts)[0].detach(), padded(original, texts)[0].detach()
    logprobs = logprobs.detach()
    exact = ((logprobs * mask).sum(1).exp() * ((logprobs - reference) * mask).sum(1)).sum()
    probabilities = (sampling * mask).sum(1).exp()
    drawn = torch.multinomial(probabilities, 60_000, replacement=True, generator=torch.Generator().manual_seed(1))
    ratios = log_ratios(logprobs[drawn], sampling[drawn], mask[drawn])
    assert mean_ratio(ratios).item() == pytest.approx(1, abs=0.05)
    from_original = ((logprobs - reference) * mask).sum(1)[drawn]
    assert sampled_kl(from_original, ratios).item() == pytest.approx(exact.item(), rel=0.1)


def test_effective_sample_fraction():
    assert effective_sample_fraction(torch.zeros(8)).item() == pytest.approx(1)
    assert effective_sample_fraction(torch.tensor([14.0, -14, -14, -14])).item() == pytest.approx(0.25)
    r = torch.tensor([0.5, 1.0, 3.0])
    assert effective_sample_fraction(r.log()).item() == pytest.approx(float(r.sum() ** 2 / (3 * (r**2).sum())))


def test_ratios_beyond_every_number_stay_numbers():
    """A text of 2,000 tokens, each a nat likelier or less likely now: exp(2000) is none, and inf times 0 neither."""
    drawn, mask = torch.zeros(4, 2000), torch.ones(4, 2000)
    now = torch.tensor([1.0, -1.0, 0.0, 1.0])[:, None].expand(4, 2000)
    ratios = log_ratios(now, drawn, mask)
    # One draw holds the likeliest text and the least likely one, whose ratios cancel.
    of_draws = draw_log_ratios(ratios, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 1, 2]), 3)
    assert importance_weights(of_draws, cap=3).tolist() == pytest.approx([1, 1, 3])
    assert effective_sample_fraction(ratios).item() == pytest.approx(0.5)
    for value in (mean_ratio(ratios), mismatch_kl(now, drawn, mask), sampled_kl(now.sum(1), ratios)):
        assert torch.isfinite(value).all()


def test_scaled_weights_have_the_same_direction_and_a_mean_square_of_one():
    weights = torch.tensor([[0.5, -0.25], [0.0, 2.0]])
    found = scaled(weights)
    assert float(found.square().mean()) == pytest.approx(1)
    torch.testing.assert_close(found / found[1, 1], weights / weights[1, 1])
    assert torch.equal(scaled(torch.zeros(2, 3)), torch.zeros(2, 3))
    torch.testing.assert_close(scaled(1e-3 * weights), found)
