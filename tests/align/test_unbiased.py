"""What a step descends, from samples to loss, against enumeration: every text of a tiny language in every place.

``Rows.of`` and ``loss_of`` are what the trainer calls; only the LLM is a table.
"""

import itertools
from collections.abc import Iterator

import pytest
import torch
from test_objective import TinyLM, all_texts
from torch import Tensor

from align.config import AlignConfig, ObjectiveConfig
from align.generator import fresh_places
from align.logprobs import scored
from align.objective import reward_weights, scaled
from align.policy import Rows, loss_of
from align.samples import Other, Sample, Text

ALPHA, LENGTH = 0.37, 2
TEXTS = all_texts(LENGTH)
POLICY, ORIGINAL, OLD = (TinyLM(seed, LENGTH) for seed in (0, 1, 5))
CAPLESS = 1e9


def logprob(lm: TinyLM, text: tuple[int, ...]) -> Tensor:
    return lm.token_logprobs(text).sum()


def make(
    seeds: list[list[int]], texts: dict[int, int], drawn_from: TinyLM, others: list[Other] | None = None
) -> Sample:
    """A sample with k draws of n texts, by seeds, each a number of ``TEXTS``."""
    draws = [
        [
            Text(seed, list(TEXTS[texts[seed]]), drawn_from.token_logprobs(TEXTS[texts[seed]]).tolist(), "")
            for seed in draw
        ]
        for draw in seeds
    ]
    n = len(seeds[0])
    places = list(range(n))
    return Sample(0, 0, [1] * (n + 1), 1, True, True, places, [[1]] * n, draws, others or [], [], 0.0, 0, 0)


def descended(samples: list[Sample], weights: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The loss of one step."""
    rows = Rows.of(samples, torch.device("cpu"))
    told = {text.seed: tuple(text.token_ids) for sample in samples for draw in sample.draws for text in draw}
    logits, reference = (torch.cat([lm.token_logits(text) for text in told.values()]) for lm in (POLICY, ORIGINAL))
    chosen, token_kl = scored(logits, rows.next_ids, reference.detach())
    of_original, _ = scored(reference.detach(), rows.next_ids)
    values = (rows.by_text(value) for value in (chosen, of_original, token_kl))
    loss, _, _ = loss_of(objective, rows, weights, *values)
    return loss


def expected_gradient(objective: Tensor) -> Tensor:
    return torch.autograd.grad(objective, POLICY.logits)[0]


def minus_kl() -> Tensor:
    log_p = torch.stack([logprob(POLICY, text) for text in TEXTS])
    log_orig = torch.stack([logprob(ORIGINAL, text) for text in TEXTS]).detach()
    return (log_p.exp() * (log_orig - log_p)).sum()


def gradient_over(outcomes: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
    """Minus the gradient of Σ probability · loss, a few thousand terms at a time."""
    total = torch.zeros_like(POLICY.logits)
    while some := list(itertools.islice(outcomes, 500)):
        loss = torch.stack([probability.detach() * loss for probability, loss in some]).sum()
        total -= torch.autograd.grad(loss, POLICY.logits)[0]
    return total


def likelihoods(*shape: int, seed: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).double().log()


def rewards(log_p: list[list[Tensor]], exact: Tensor, baseline: str) -> Tensor:
    return reward_weights(torch.stack([torch.stack(own) for own in log_p]), exact, baseline).detach()


PROBABILITY = {lm: torch.stack([logprob(lm, text) for text in TEXTS]).exp().detach() for lm in (POLICY, OLD)}


@pytest.mark.parametrize(("kl", "drawn_from"), [("sampled", POLICY), ("exact", OLD)], ids=["fresh", "stale"])
def test_shared_texts_with_several_draws_leave_one_out_and_importance(kl, drawn_from):
    """Two histories share item a, the second has item c too; two draws of each, by today's policy or an older one."""
    first, second = likelihoods(len(TEXTS), seed=4), likelihoods(len(TEXTS), len(TEXTS), seed=6)
    log_p = torch.stack([logprob(POLICY, text) for text in TEXTS])
    exact = torch.stack(
        [torch.logsumexp(first + log_p, 0), torch.logsumexp((second + log_p[:, None] + log_p).flatten(), 0)]
    )
    settings = ObjectiveConfig(samples=2, baseline="leave-one-out", alpha=ALPHA, kl=kl, max_importance=CAPLESS)

    def outcomes() -> Iterator[tuple[Tensor, Tensor]]:
        for a1, a2, c1, c2 in itertools.product(range(len(TEXTS)), repeat=4):
            texts = {0: a1, 1: a2, 2: c1, 3: c2}
            samples = [make([[0], [1]], texts, drawn_from), make([[0, 2], [1, 3]], texts, drawn_from)]
            found = [[first[a1], first[a2]], [second[a1, c1], second[a2, c2]]]
            weights = rewards(found, exact.detach(), "leave-one-out")
            yield PROBABILITY[drawn_from][[a1, a2, c1, c2]].prod(), descended(samples, weights, settings)

    # Three texts of two histories.
    expected = expected_gradient(exact.mean() + ALPHA * 1.5 * minus_kl())
    torch.testing.assert_close(gradient_over(outcomes()), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("baseline", ["none", "one", "leave-one-out"])
def test_pairs_that_are_each_others_baseline(baseline):
    """k of 1: what is left out is this pair, the baseline is the other one's ratio."""
    tables = likelihoods(2, len(TEXTS), seed=8)
    log_p = torch.stack([logprob(POLICY, text) for text in TEXTS])
    exact = torch.logsumexp(tables + log_p, 1)
    settings = ObjectiveConfig(baseline=baseline, alpha=ALPHA)

    def outcomes() -> Iterator[tuple[Tensor, Tensor]]:
        for one, other in itertools.product(range(len(TEXTS)), repeat=2):
            texts = {0: one, 1: other}
            weights = rewards([[tables[0, one]], [tables[1, other]]], exact.detach(), baseline)
            samples = [make([[seed]], texts, POLICY) for seed in texts]
            yield PROBABILITY[POLICY][[one, other]].prod(), descended(samples, weights, settings)

    expected = expected_gradient(exact.mean() + ALPHA * minus_kl())
    torch.testing.assert_close(gradient_over(outcomes()), expected, rtol=1e-5, atol=1e-7)


def test_one_random_item_is_fresh_and_the_others_read_the_newest_texts():
    """Two items, each as often the fresh one; the other's newest text is part of x, and no score is its."""
    settings = AlignConfig(fresh="random", others="newest", objective={"alpha": ALPHA})
    tables = likelihoods(2, len(TEXTS), seed=9)
    seeds = [str(seed) for seed in range(400)]
    places = [fresh_places(settings, 2, seed) for seed in seeds]
    shares = [places.count([place]) / len(seeds) for place in (0, 1)]
    assert shares[0] == pytest.approx(0.5, abs=0.08)
    log_p = torch.stack([logprob(POLICY, text) for text in TEXTS])
    exact = torch.logsumexp(tables + log_p, 1)

    def outcomes() -> Iterator[tuple[Tensor, Tensor]]:
        for place, text in itertools.product((0, 1), range(len(TEXTS))):
            weights = rewards([[tables[place, text]]], exact[[place]].detach(), "none")
            sample = make([[0]], {0: text}, POLICY, [Other(1 - place, "newest")])
            yield 0.5 * PROBABILITY[POLICY][text], descended([sample], weights, settings.objective)

    expected = expected_gradient(exact.mean() + ALPHA * minus_kl())
    torch.testing.assert_close(gradient_over(outcomes()), expected, rtol=1e-5, atol=1e-7)


def by_hand(draws: list[list[list[int]]], log_p_y: list[list[float]], cap: float) -> Tensor:
    """The recommended combination, a token at a time, as a gain: group mean, leave-one-out, scaled, exact KL, cut.

    Args:
        draws: [B][k][n] numbers of texts.
        log_p_y: [B][k].
        cap: of importance.
    """
    weights = []
    for own in log_p_y:
        p = [float(torch.tensor(value).exp()) for value in own]
        ratios = [value / (sum(p) / len(p)) for value in p]
        weights.append([r - (sum(ratios) - r) / (len(ratios) - 1) for r in ratios])
    size = (sum(w * w for own in weights for w in own) / sum(map(len, weights))) ** 0.5
    gain, count = 0.0, 0
    for own, group in zip(weights, draws, strict=True):
        for weight, draw in zip(own, group, strict=True):
            ratio = 1.0
            for number in draw:
                ratio *= float((logprob(POLICY, TEXTS[number]) - logprob(OLD, TEXTS[number])).detach().exp())
            scores = 0.0
            for number in draw:
                kl = []
                for logits, of_original in zip(
                    *(lm.token_logits(TEXTS[number]) for lm in (POLICY, ORIGINAL)), strict=True
                ):
                    p, q = logits.softmax(-1), of_original.detach().softmax(-1)
                    kl.append((p * (p / q).log()).sum())
                for place, chosen in enumerate(POLICY.token_logprobs(TEXTS[number])):
                    later = sum(float(value.detach()) for value in kl[place + 1 :])
                    scores = scores + (weight / size - ALPHA * later) * chosen - ALPHA * kl[place]
            gain, count = gain + min(cap, ratio) * scores, count + 1
    return gain / count


@pytest.mark.parametrize("cap", [1.2, CAPLESS])
def test_the_recommended_combination_is_what_it_says_it_is(cap):
    settings = ObjectiveConfig(
        samples=4, denominator="group", baseline="leave-one-out", scale_rewards=True, kl="exact", alpha=ALPHA,
        max_importance=cap,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        numbers = torch.randint(len(TEXTS), (3, 4, 2), generator=generator).tolist()
        log_p_y = torch.rand(3, 4, generator=generator).double().log()
        seeds = itertools.count()
        samples = []
        for group in numbers:
            own = [[next(seeds) for _ in draw] for draw in group]
            texts = {
                seed: number
                for ids, draw in zip(own, group, strict=True)
                for seed, number in zip(ids, draw, strict=True)
            }
            samples.append(make(own, texts, OLD))
        weights = scaled(
            reward_weights(log_p_y, torch.zeros(3).double(), settings.baseline, None, settings.denominator)
        )
        found = -torch.autograd.grad(descended(samples, weights, settings), POLICY.logits)[0]
        expected = torch.autograd.grad(by_hand(numbers, log_p_y.tolist(), cap), POLICY.logits)[0]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
