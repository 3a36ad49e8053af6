"""Eq. 1 to 7 against one text, one pair, one token at a time."""

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from llm.config import LMRecConfig
from llm.corpus import HistoryCorpus, ItemTokens, PackedBatches
from llm.joint import Head, JointModel, Statistics, pair_loss, softmax_loss
from llm.lmrec import build_lmrec
from llm.lmrec_evaluation import LMRecRecommender
from llm.lmrec_job import RecommendConfig
from llm.prompts import item_texts
from llm.recommendation import RecommendationTask
from llm.tokenizer import train_tokenizer
from llm.training import Plan, Training
from rec.config import EvaluateConfig
from rec.evaluation import evaluate
from rec.runtime.runfolder import RunFolder

CONTEXT = 48


@pytest.fixture(scope="module")
def texts(small_data):
    return item_texts(small_data.items, "{title}")


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 400, CONTEXT)


@pytest.fixture(scope="module")
def tokens(tokenizer, texts):
    return ItemTokens(tokenizer, texts, CONTEXT - 1)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    size = LMRecConfig(dim=32, heads=2, layers=2, context=CONTEXT)
    return JointModel(build_lmrec(size, len(tokenizer), tokenizer.eos_token_id), ["target"], standardise=False)


def make_task(data, tokens, **more):
    settings = {"pairs": 32, "prefixes": 4, "negatives": 10, "micro_histories": 3} | more.pop("settings", {})
    return RecommendationTask("target", 0, data, tokens, RecommendConfig(**settings), CONTEXT, seed=5, **more)


def test_the_loss_of_pairs_is_eq_4_and_5_pair_by_pair():
    rng = np.random.default_rng(0)
    positive, negative, allowed = rng.normal(size=3), rng.normal(size=(3, 4)), rng.random((3, 4)) < 0.7
    total = 0.0
    for pair in range(3):
        p = 1 / (1 + math.exp(-positive[pair]))
        own = [1 / (1 + math.exp(-score)) for score in negative[pair][allowed[pair]]]
        total += -math.log(p) + sum(-math.log(1 - p) for p in own) / max(1, len(own))
    given = (torch.from_numpy(positive), torch.from_numpy(negative), torch.from_numpy(allowed))
    assert pair_loss(*given).item() == pytest.approx(total / 6)
    scores = [[positive[row], *negative[row][allowed[row]]] for row in range(3)]
    softmax = [-math.log(math.exp(own[0]) / sum(map(math.exp, own))) for own in scores]
    assert softmax_loss(*given).item() == pytest.approx(sum(softmax) / 3)


def test_the_language_loss_is_eq_1_token_by_token(small_data, texts, tokenizer, model):
    corpus = HistoryCorpus(small_data, texts, tokenizer, CONTEXT)
    documents = [row.ids for row in corpus.rows(0, 0)]
    batches = PackedBatches(documents, CONTEXT, corpus.eos, rows=6, micro=4, seed=1)
    total, count, learnt = 0.0, 0, 0.0
    for part in batches.parts(3):
        learnt += model(part).item() * part.tokens
    for row in batches.order.samples(3):
        for number in batches.rows[row]:
            ids = list(batches.documents[number].ids)
            logits = GPT2LMHeadModel.forward(model.decoder, torch.tensor([ids])).logits[0].log_softmax(-1)
            total -= sum(logits[place, ids[place + 1]].item() for place in range(len(ids) - 1))
            count += len(ids) - 1
    assert batches.learnt_tokens(3) == count == sum(part.tokens for part in batches.parts(3))
    assert learnt / count == pytest.approx(total / count, rel=1e-5)


def test_heads_standardise_by_the_batch_then_by_what_is_fixed_and_are_eq_4_without():
    torch.manual_seed(0)
    head, plain = Head(4), Head(4, standardise=False)
    plain.linear.weight = head.linear.weight
    assert plain.linear.bias is None
    one, other = (3 + 2 * torch.randn(50, 4) for _ in range(2))

    def by(states):
        scaled = (other - states.mean(0)) / (states.std(0, correction=0) + 1e-2)
        return scaled @ head.linear.weight.T + head.linear.bias

    torch.testing.assert_close(head(other), by(other))
    head.fix(one)
    torch.testing.assert_close(head(other), by(one))
    torch.testing.assert_close(head(other[:1]), by(one)[:1])
    torch.testing.assert_close(plain(other), other @ head.linear.weight.T)
    # The statistics of a batch are part of the function that is differentiated.
    assert torch.autograd.gradcheck(Head(4).double(), torch.randn(6, 4, dtype=torch.float64, requires_grad=True))


def test_a_state_far_from_all_others_leaves_them_what_they_are():
    torch.manual_seed(0)
    near, way = 5 + 0.05 * torch.randn(40, 4), torch.tensor([3.0, 0, 0, 4])
    head = Head(4)
    expected, found = head(near), head(torch.cat([near, near[:1] + 100 * way]))
    torch.testing.assert_close(found[:-1], expected, rtol=0.2, atol=0.05)
    assert found[-1].isfinite().all()
    # It is moved towards the median, no nearer than the others are, and gradients still turn it.
    centre, reach, mean, deviation = Statistics.of(torch.cat([near, near[:1] + 100 * way]))
    moved = Statistics(centre, reach, mean, deviation).within_reach(near[:1] + 100 * way)[0]
    torch.testing.assert_close(F.normalize(moved, dim=0), way / 5, rtol=0, atol=1e-2)
    assert moved.norm().item() == pytest.approx(reach.item())
    assert reach > (near - centre).norm(dim=1).max()


def test_the_median_of_many_states_is_told_by_some_of_them(monkeypatch):
    torch.manual_seed(0)
    states = torch.randn(1000, 3)
    exact = Statistics.of(states)
    monkeypatch.setattr("llm.joint.MEDIAN_STATES", 300)
    about = Statistics.of(states)
    assert not torch.equal(about.centre, exact.centre)
    for name, close in (("centre", 0.2), ("reach", 0.8), ("deviation", 1e-4)):
        torch.testing.assert_close(getattr(about, name), getattr(exact, name), rtol=0, atol=close)
    # The centre is only where distances are taken from: the mean of what is within reach is the same.
    torch.testing.assert_close(about.centre + about.mean, exact.centre + exact.mean, rtol=0, atol=1e-4)


def test_states_that_are_all_alike_or_one_alone_are_standardised_to_0():
    for states in (torch.full((5, 3), 2.0), torch.tensor([[1.0, 2.0, 3.0]])):
        own = Statistics.of(states)
        assert torch.equal((own.within_reach(states) - own.mean) / own.deviation, torch.zeros(states.shape))


def test_a_head_that_is_not_used_gets_gradients_of_0(model, tokenizer):
    joint = JointModel(model.decoder, ["target", "other"])
    value = joint._nothing_of(["other"])
    value.backward()
    assert value.item() == 0
    assert all(not bool(own.grad.any()) for own in joint.heads["other"].parameters())


def test_every_epoch_reads_every_document_once(small_data, texts, tokenizer):
    documents = [row.ids for row in HistoryCorpus(small_data, texts, tokenizer, CONTEXT).rows(0, 0)]
    batches = PackedBatches(documents, CONTEXT, tokenizer.eos_token_id, rows=1, micro=1, seed=1)
    seen = [batches.rows[row] for step in range(len(batches.rows)) for row in batches.order.samples(step)]
    read = sorted(list(batches.documents[number].ids) for row in seen for number in row)
    assert read == sorted(documents)


def state_of(model, ids):
    """The last layer's state of [EOS] after ``ids``, in a pass of its own."""
    eos = model.decoder.config.eos_token_id
    return model.decoder.transformer(torch.tensor([[*ids, eos]]), use_cache=False).last_hidden_state[0, -1]


@torch.no_grad()
@pytest.mark.parametrize("exclude", ["target", "taken"])
def test_pairs_are_prefixes_of_training_histories_and_their_next_items(
    small_data, texts, tokenizer, tokens, model, exclude
):
    task, heads = make_task(small_data, tokens, settings={"exclude": exclude}), model.heads["target"]
    parts, pairs = task.parts(2)
    assert pairs == sum(len(part.positives) for part in parts) == 32
    histories = defaultdict(list)  # several users may begin alike
    for begin, end in zip(small_data.offsets[:-1].tolist(), small_data.train_ends.tolist(), strict=True):
        items = (small_data.sequence[begin:end] - 1).tolist()
        for cut in range(1, len(items)):
            text = " → ".join(texts[item] for item in items[:cut])
            left_out = set(items) if exclude == "taken" else {items[cut]}
            histories[tuple(tokenizer(text)["input_ids"])].append((items[cut], left_out))
    for part in parts:
        flat_ids, flat_documents = part.histories.ids.flatten(), part.histories.documents.flatten()
        branches, positions = part.histories.branches.flatten(), part.histories.positions.flatten()
        row_of = torch.arange(len(part.histories.ids)).repeat_interleave(part.histories.ids.shape[1])
        numbers = [tuple(tokens.head[number]) for number in range(small_data.n_items)]
        expected = 0.0
        texts_of_items = []
        for place in part.vectors.tolist():
            same = part.items.documents.flatten() == part.items.documents.flatten()[place]
            same &= torch.arange(len(same)) // part.items.ids.shape[1] == place // part.items.ids.shape[1]
            same &= ~part.items.branches.flatten()
            texts_of_items.append(numbers.index(tuple(part.items.ids.flatten()[same].tolist())))
        z_items = [heads.item(state_of(model, tokens.head[number])) for number in texts_of_items]
        for pair, place in enumerate(part.users.tolist()):
            own = (flat_documents == flat_documents[place]) & (row_of == row_of[place]) & ~branches
            prefix = tuple(flat_ids[own & (positions < positions[place])].tolist())
            z_user = heads.user(state_of(model, prefix))
            scores = [torch.dot(z_user, z_items[number]).item() for number in part.negatives.tolist()]
            drawn, free = [texts_of_items[number] for number in part.negatives.tolist()], part.allowed[pair].tolist()
            pairs = [(target, [item not in taken for item in drawn]) for target, taken in histories[prefix]]
            assert (texts_of_items[part.positives[pair]], free) in pairs
            own_scores = [score for score, is_free in zip(scores, free, strict=True) if is_free]
            y1 = math.log1p(math.exp(-torch.dot(z_user, z_items[part.positives[pair]]).item()))
            expected += (y1 + sum(math.log1p(math.exp(score)) for score in own_scores) / len(own_scores)) / 2
        assert model(part).item() == pytest.approx(expected / len(part.positives), rel=1e-4)


class Recorder:
    """An engine that trains nothing."""

    device = torch.device("cpu")

    gradient_norm = 1.0

    def __init__(self, model):
        self.model = model

    def step(self, parts, lr):
        losses = [self.model(part.batch) for part in parts]
        self.total = sum(part.weight * loss.item() for part, loss in zip(parts, losses, strict=True))
        return [loss.item() for loss in losses]

    def losses(self, batches):
        return [0.0 for _ in batches]


@torch.no_grad()
@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_a_step_s_loss_is_eq_6_over_the_sum_of_its_pairs_or_their_mean(small_data, tokens, model, tmp_path, loss):
    found = {}
    for reduction in ("sum", "mean"):
        settings = {"loss": loss, "reduction": reduction, "pairs": 96, "prefixes": 12}  # more than a history has
        task = make_task(small_data, tokens, settings=settings)
        plan = Plan(5, lambda step: 1.0, None, 5, [task], weight=lambda step: 0.25, validation_users=4, patience=9)
        engine = Recorder(JointModel(model.decoder, ["target"], loss, standardise=False))
        engine.model.heads = model.heads
        row = Training(plan, engine, RunFolder(tmp_path / reduction), {}, "")._update(2)
        found[reduction] = engine.total
    parts, pairs = task.parts(2)
    each = [engine.model(part).item() * len(part.positives) for part in parts]  # mean over y = 0 and y = 1 for bce
    assert row["pairs_target"] == pytest.approx(sum(each) / pairs)
    assert found["mean"] == pytest.approx(0.25 * sum(each) / pairs)
    assert found["sum"] == pytest.approx(found["mean"] * pairs)
    assert pairs != task.config.pairs  # or it would not show which of them counts
    assert row["pairs"] == pairs


@torch.no_grad()
def test_in_batch_negatives_are_a_softmax_over_the_pass_s_items_corrected_for_being_there(small_data, tokens, model):
    settings = {"loss": "softmax", "in_batch": True, "negatives": 4}
    task = make_task(small_data, tokens, settings=settings)
    joint = JointModel(model.decoder, ["target"], "softmax", standardise=False)
    joint.heads = model.heads
    part = task.parts(2)[0][0]
    users = joint.user_vectors("target", part.histories, part.users)
    items = joint.item_vectors("target", part.items, part.vectors)
    here = [number for number in range(small_data.n_items) if any(  # the pass's items, by their vectors
        torch.allclose(own, joint.item_vectors("target", *task.rows.items(np.array([number])))[0], atol=1e-5)
        for own in items
    )]  # fmt: skip
    assert len(here) == len(items) > 4
    pairs, expected = len(users), 0.0
    for user, positive in zip(users, part.positives.tolist(), strict=True):
        logits = []
        for number, item in zip(here, items, strict=True):
            absent = (1 - task.shares[number]) ** pairs * (1 - 4 / small_data.n_items)
            logits.append(torch.dot(user, item).item() - math.log(1 - absent))
        expected += math.log(sum(map(math.exp, logits))) - logits[positive]
    assert joint(part).item() == pytest.approx(expected / pairs, rel=1e-4)
    assert not any(bool(batch.presence.any()) for batch, _ in task.validation(9))  # comparable from recipe to recipe


@pytest.mark.parametrize("prefixes", [2, 8])
@pytest.mark.parametrize("long", [False, True])
def test_an_items_share_is_how_often_it_is_drawn_as_a_target(small_data, tokens, prefixes, long):
    """Of histories of unlike length, and of some that are read in windows."""
    task = make_task(small_data, tokens, settings={"prefixes": prefixes})
    if not long:
        task.spans[:, 1] = task.spans[:, 0] + 2 + np.arange(len(task.spans)) % 5
    rng, count = np.random.default_rng(3), np.zeros(small_data.n_items)
    for _ in range(200):
        for history in range(len(task.spans)):
            (begin, end), cuts = task._window(history, rng)
            np.add.at(count, task.items[begin:end][cuts], 1)
    np.testing.assert_allclose(count / count.sum(), task.shares, atol=0.005)


def test_validation_pairs_are_the_validation_items_after_all_that_was_before_them(small_data, tokens):
    items, (users, ends) = (small_data.sequence - 1).numpy(), small_data.instances("valid")
    expected = []
    for user, end in zip(users.tolist(), ends.tolist(), strict=True):
        history = items[int(small_data.offsets[user]) : end]
        read = tokens.joined(tokens.that_fit(history, CONTEXT - 1))[0]
        expected.append(([*read, tokens.eos], [*tokens.head[items[end]], tokens.eos]))

    def document(packed, place: int) -> list[int]:
        row, column = divmod(place, packed.ids.shape[1])
        own = packed.documents[row] == packed.documents[row, column]
        return packed.ids[row][own].tolist()

    found = [
        (document(batch.histories, place), document(batch.items, int(batch.vectors[positive])))
        for batch, _ in make_task(small_data, tokens).validation(999)
        for place, positive in zip(batch.users.tolist(), batch.positives.tolist(), strict=True)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("prefixes", [1, 4, 16, 32])
def test_a_step_has_about_as_many_pairs_as_the_recipe_says_however_short_histories_are(small_data, tokens, prefixes):
    task = make_task(small_data, tokens, settings={"pairs": 128, "prefixes": prefixes})
    counts = [task.parts(step)[1] for step in range(20)]
    assert task.order.batch % (128 // prefixes) == 0
    one_less, one_more = (np.mean(counts) * (1 + sign * (128 // prefixes) / task.order.batch) for sign in (-1, 1))
    assert one_less < 128 < one_more


def test_validation_has_the_same_random_items_whatever_is_trained_with(small_data, tokens):
    def items_of(negatives):
        task = make_task(small_data, tokens, settings={"negatives": negatives})
        return [(batch.items.ids.tolist(), batch.negatives.tolist()) for batch, _ in task.validation(9)]

    assert items_of(4) == items_of(20)
    assert len(items_of(4)[0][1]) == small_data.n_items  # all of them, where there are fewer than 512


def test_items_of_one_text_are_no_negatives_of_each_other(small_data, texts, tokenizer):
    same = [*texts[:1], texts[0], *texts[2:]]
    tokens = ItemTokens(tokenizer, same, CONTEXT - 1)
    task = make_task(small_data, tokens, settings={"negatives": small_data.n_items})
    negatives, targets = np.arange(small_data.n_items), [np.array([0, 5]), np.array([1])]
    batch = task._pairs(*task.rows.histories([np.array([2])]), targets, negatives, [np.array([2])] * 2)
    assert [(~row).nonzero().flatten().tolist() for row in batch.allowed] == [[0, 1], [5], [0, 1]]


def test_a_history_that_is_too_long_is_read_in_a_window(small_data, tokens):
    task = make_task(small_data, tokens, settings={"prefixes": 8, "pairs": 64})
    own = tokens.joined(task.items[task.spans[0, 0] : task.spans[0, 1] - 1])[0]
    assert len(own) > CONTEXT - 8  # or this tests nothing
    ends = set()
    for step in range(12):
        for part in task.parts(step)[0]:
            assert part.histories.positions.max() < CONTEXT
            ends |= set(part.histories.positions.max(1).values.tolist())
    assert len(ends) > 1


def test_a_step_is_the_same_on_any_number_of_ranks(small_data, tokens, model):
    """The weighted losses of all ranks average to the one rank's loss, and so do their gradients."""

    def gradient(world):
        model.zero_grad()
        for rank in range(world):
            parts, pairs = make_task(small_data, tokens, rank=rank, world=world).parts(4)
            for part in parts:
                (model(part) * len(part.positives) / pairs).backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    alone = gradient(1)
    for world in (2, 4):
        for name, value in gradient(world).items():
            torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-6)


def test_validation_ranks_what_the_user_took_as_the_test_does(small_data, tokens):
    task = make_task(small_data, tokens, settings={"exclude": "taken"})
    assert any((~part.allowed).sum(1).max() > 1 for part in task.parts(0)[0])
    for batch, _ in task.validation(17):
        assert ((~batch.allowed).sum(1) == 1).all()  # the pair's own target


def test_validation_shares_add_up_on_any_number_of_ranks(small_data, tokens):
    for world in (1, 2, 3):
        ranks = [make_task(small_data, tokens, rank=rank, world=world).validation(17) for rank in range(world)]
        assert len({len(own) for own in ranks}) == 1
        assert sum(share for own in ranks for _, share in own) == pytest.approx(1)
        assert sum(len(batch.positives) for own in ranks for batch, share in own if share) == 17


def test_the_evaluator_ranks_by_eq_4(small_data, tokens, model):
    model.eval()
    found = evaluate(LMRecRecommender(model, "target", tokens, CONTEXT), small_data, "test", EvaluateConfig())
    heads, items = model.heads["target"], (small_data.sequence - 1).numpy()
    with torch.no_grad():
        table = torch.stack([heads.item(state_of(model, ids)) for ids in tokens.head])
        for user in range(0, small_data.n_users, 7):
            begin, end = int(small_data.offsets[user]), int(small_data.offsets[user + 1]) - 1
            history = items[begin:end]
            while len(tokens.joined(history)[0]) > CONTEXT - 1:
                history = history[1:]
            scores = table @ heads.user(state_of(model, tokens.joined(history)[0]))
            rank = 1 + int((scores > scores[items[end]] + 1e-5).sum())
            assert found.ranks[user].item() == pytest.approx(rank, abs=1)
