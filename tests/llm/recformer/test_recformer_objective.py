"""The contrast and the whole pretraining loss against loops, and their independence of how a batch is divided."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from objective_setting import make_setting
from torch.nn import functional as F

from llm.recformer import mlm
from llm.recformer.batches import pad
from llm.recformer.config import RecformerSettings
from llm.recformer.contrastive import item_contrast
from llm.recformer.engine import linear_rate
from llm.recformer.objective import Objective
from llm.recformer.sources import Sources
from rec.runtime.config import build
from rec.runtime.errors import UserError

ROOT = Path(__file__).parents[3]


def naive_contrast(histories, next_items, numbers, temperature, mask_duplicates) -> torch.Tensor:
    losses = []
    for i in range(len(histories)):
        total = 0.0
        for j in range(len(histories)):
            if mask_duplicates and j != i and numbers[i] == numbers[j]:
                continue
            cosine = (histories[i] @ next_items[j]) / (histories[i].norm() * next_items[j].norm())
            total = total + torch.exp(cosine / temperature)
        own = (histories[i] @ next_items[i]) / (histories[i].norm() * next_items[i].norm()) / temperature
        losses.append(total.log() - own)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("mask_duplicates", [True, False])
def test_the_contrast_equals_a_loop(mask_duplicates):
    torch.manual_seed(0)
    histories = torch.randn(6, 5, dtype=torch.double, requires_grad=True)
    next_items = (histories.detach() + torch.randn(6, 5, dtype=torch.double)).requires_grad_()
    numbers = torch.tensor([3, 1, 3, 2, 5, 1])
    found, hits = item_contrast(histories, next_items, numbers, 0.2, mask_duplicates)
    expected = naive_contrast(histories, next_items, numbers, 0.2, mask_duplicates)
    torch.testing.assert_close(found, expected)
    own = torch.autograd.grad(found, (histories, next_items))
    for one, other in zip(own, torch.autograd.grad(expected, (histories, next_items)), strict=True):
        torch.testing.assert_close(one, other)
    cosines = torch.nn.functional.cosine_similarity(histories[:, None], next_items[None], dim=-1)
    for row in range(6):
        twins = [other for other in range(6) if mask_duplicates and other != row and numbers[other] == numbers[row]]
        others = [cosines[row, other] for other in range(6) if other not in (row, *twins)]
        assert bool(hits[row]) == bool(cosines[row, row] > max(others))
    assert 0 < hits.sum() < 6


def naive_objective(objective: Objective, batch) -> torch.Tensor:
    """One sequence at a time, without padding; the head's softmax over the vocabulary written out."""
    model, head, stage = objective.model, objective.head, objective.stage
    count = len(batch.numbers)
    vectors, sums = [], [0.0, 0.0]
    for row in range(2 * count):
        for_contrast = batch.masked if stage.shared_pass and stage.mlm_weight else batch.plain
        single = pad(for_contrast, np.array([row]), objective.pad_token)
        vectors.append(model(single).last_hidden_state[0, 0])
        masked = pad(batch.masked, np.array([row]), objective.pad_token)
        hidden = model(masked).last_hidden_state[0]
        for place, label in enumerate(masked.labels[0].tolist()):
            if label >= 0 and stage.mlm_weight:
                state = head.norm(F.gelu(head.dense(hidden[place])))
                logits = model.backbone.get_input_embeddings().weight @ state + head.bias
                sums[row >= count] = sums[row >= count] - logits.log_softmax(0)[label]
    contrast = naive_contrast(
        torch.stack(vectors[:count]), torch.stack(vectors[count:]), batch.numbers, objective.temperature,
        stage.duplicates == "mask",
    )  # fmt: skip
    mlm = [total / labels for total, labels in zip(sums, batch.labels, strict=True)]
    return contrast + stage.mlm_weight * (mlm[0] + mlm[1])


def gradients(objective: Objective, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}


WAYS = {
    "one part": {"part_tokens": 100_000},
    "parts of like length": {"part_tokens": 64},
    "recomputed": {"part_tokens": 64, "recompute": True},
    "one sequence a part, recomputed": {"part_tokens": 1, "recompute": True},
    "histories and items apart": {"by_length": False},
    "the same, three at a time": {"by_length": False, "micro_batch": 3},
}


@pytest.mark.parametrize("shared_pass", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_loss_and_gradient_are_those_of_one_big_batch_however_it_is_divided(
    bert, small_data, tmp_path, way, shared_pass
):
    stage = {**WAYS[way], "shared_pass": shared_pass, "mlm_weight": 0.3, "precision": "fp32"}
    objective, batch = make_setting(bert, small_data.folder, tmp_path, stage)
    found, figures = objective(batch)
    own = gradients(objective, found)
    expected = naive_objective(objective, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    reference = gradients(objective, expected)
    assert own.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-6, msg=name)
    assert figures["tokens"] == len(batch.plain.ids)
    assert figures["places"] >= figures["tokens"] * (1 if shared_pass else 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_loss_and_gradient_on_a_gpu_are_the_cpus(bert, small_data, tmp_path):
    stage = {"part_tokens": 64, "recompute": True, "mlm_weight": 0.3, "precision": "fp32"}
    objective, batch = make_setting(bert, small_data.folder, tmp_path, stage)
    expected, _ = objective(batch)
    reference = gradients(objective, expected)
    found, _ = objective.cuda()(batch)
    own = gradients(objective, found)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert own.keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(own[name].cpu(), value, rtol=5e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(("contrast", "mlm_weight"), [(1, 0.3), (0, 0.3), (2, 0)])
def test_the_weights_say_what_the_loss_is_made_of(bert, small_data, tmp_path, contrast, mlm_weight):
    stage = {"contrast_weight": contrast, "mlm_weight": mlm_weight, "shared_pass": False, "precision": "fp32"}
    objective, batch = make_setting(bert, small_data.folder, tmp_path, stage)
    loss, figures = objective(batch)
    torch.testing.assert_close(loss, contrast * figures["contrast"] + mlm_weight * figures["mlm"])
    assert (figures["mlm"] == 0) == (mlm_weight == 0)


def test_a_loss_of_nothing_is_refused():
    with pytest.raises(UserError, match="mlm_weight and contrast_weight are both 0"):
        build(RecformerSettings, {"pretrain": {"mlm_weight": 0, "contrast_weight": 0}})
    with pytest.raises(UserError, match="the stage would tune nothing; leave it out with pretrain=null"):
        build(RecformerSettings, {"pretrain": {"tune_layers": "none"}})


def test_passes_of_their_own_are_padded_to_the_longest_of_a_micro_batch(bert, small_data, tmp_path):
    stage = {"by_length": False, "micro_batch": 3, "precision": "fp32"}
    objective, batch = make_setting(bert, small_data.folder, tmp_path, stage)
    lengths, padded = batch.plain.lengths, 0
    for side in (lengths[:8], lengths[8:]):
        for begin in range(0, 8, 3):
            rows = side[begin : begin + 3]
            padded += len(rows) * 8 * math.ceil(max(rows) / 8)
    assert objective(batch)[1]["places"] == padded


def test_without_masked_language_modelling_the_loss_is_the_contrast(bert, small_data, tmp_path):
    objective, batch = make_setting(bert, small_data.folder, tmp_path, {"mlm_weight": 0, "precision": "fp32"})
    found, _ = objective(batch)
    torch.testing.assert_close(found, naive_objective(objective, batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_words_cost_no_gradient_of_the_vocabulary(bert, small_data, tmp_path, monkeypatch, frozen):
    tables = []
    plain = mlm.linear_cross_entropy
    monkeypatch.setattr(
        mlm,
        "linear_cross_entropy",
        lambda states, table, labels: (tables.append(table), plain(states, table, labels))[1],
    )
    stage = {"freeze_word_embeddings": frozen, "precision": "fp32"}
    objective, batch = make_setting(bert, small_data.folder, tmp_path, stage)
    loss, _ = objective(batch)
    loss.backward()
    assert len(tables) == 2  # histories and next items
    assert all(table.requires_grad != frozen for table in tables)
    assert (objective.head.bias.grad is None) == frozen
    assert objective.head.dense.weight.grad.abs().sum() > 0


def test_dropout_of_parts_that_are_recomputed_is_drawn_alike(tmp_path, small_data):
    from backbones import save_bert

    folder = save_bert(tmp_path / "bert", dropout=0.2)
    found = []
    for recompute in (False, True):
        stage = {"part_tokens": 64, "recompute": recompute, "precision": "fp32"}
        objective, batch = make_setting(folder, small_data.folder, tmp_path, stage)
        objective.train()
        torch.manual_seed(7)
        loss, _ = objective(batch)
        found.append((loss, gradients(objective, loss)))
    assert torch.equal(found[0][0], found[1][0])
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.distributed
def test_two_ranks_have_the_loss_and_gradient_of_one_big_batch(bert, small_data, tmp_path):
    stage = {"part_tokens": 64, "recompute": True, "mlm_weight": 0.3, "precision": "fp32"}
    objective, batch = make_setting(bert, small_data.folder, tmp_path, stage)
    loss, _ = objective(batch)
    reference = gradients(objective, loss)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29631",
        str(Path(__file__).with_name("objective_setting.py")), str(bert), str(small_data.folder), str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-5, atol=1e-6)
    assert found["gradients"].keys() == reference.keys()
    for name, value in reference.items():
        torch.testing.assert_close(found["gradients"][name], value, rtol=1e-3, atol=1e-6, msg=name)


def test_targets_are_uniform_over_the_second_half_of_the_training_part(small_data):
    stage = build(RecformerSettings, {"pretrain": {"batch_size": 8}}).pretrain
    sources = Sources([small_data], stage)
    assert sources.steps() == 5
    places: dict[int, int] = {}
    known = {tuple(sequence[:end].tolist()) for sequence in sources.sequences for end in range(1, len(sequence) + 1)}
    for epoch in range(60):
        seen = []
        for step in range(sources.steps()):
            pairs = sources.pairs(epoch, step)
            for history, item in zip(pairs.histories, pairs.next_items, strict=True):
                assert (*history.tolist(), item) in known
                seen.append(history)
                places[len(history)] = places.get(len(history), 0) + 1
        assert len(seen) == 40
    n = small_data.train_ends[0] - small_data.offsets[0]
    assert n == 12
    assert sorted(places) == list(range((12 - 1) // 2, 12))
    expected = 60 * 40 / len(places)
    assert max(abs(count - expected) for count in places.values()) < 5 * math.sqrt(expected)


def test_sources_never_give_what_is_held_out(small_data):
    sources = Sources([small_data, small_data], build(RecformerSettings, {"pretrain": {}}).pretrain)
    assert len(sources.sequences) == 80
    held_out = small_data.n_items  # of the first folder; the second's items are numbered on
    for row, sequence in enumerate(sources.sequences):
        user = row % 40
        begin, end = small_data.offsets[user], small_data.train_ends[user]
        expected = small_data.sequence[begin:end].numpy() + (held_out if row >= 40 else 0)
        np.testing.assert_array_equal(sequence, expected)
    users, ends = small_data.instances("valid")
    expected = []
    for more in (0, held_out):
        for user, end in zip(users.tolist(), ends.tolist(), strict=True):
            items = small_data.sequence[small_data.offsets[user] : end + 1] + more
            expected.append(items.tolist())
    found = [
        [*history.tolist(), int(item)]
        for history, item in zip(sources.valid.histories, sources.valid.next_items, strict=True)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("share", "users", "expected"), [(1.0, None, 40), (0.1, None, 4), (0.0001, None, 2), (0.5, 10, 5)]
)
def test_a_share_of_the_users_is_drawn_and_smaller_shares_are_part_of_larger_ones(small_data, share, users, expected):
    settings = {"share": share, **({"users": users} if users else {})}
    own = Sources([small_data], build(RecformerSettings, {"pretrain": settings}).pretrain)
    assert len(own.users) == expected
    everyone = Sources([small_data], build(RecformerSettings, {"pretrain": {}}).pretrain)
    assert own.users.tolist() == everyone.users[:expected].tolist()
    assert own.batch_size() == min(64, expected)


def test_batches_do_not_depend_on_how_they_are_shared_out(bert, small_data, tmp_path, monkeypatch):
    from rec.runtime.ranks import Ranks

    _, whole = make_setting(bert, small_data.folder, tmp_path, {})
    found = []
    for rank in range(2):
        monkeypatch.setattr(Ranks, "current", classmethod(lambda cls, rank=rank: cls(rank, 2)))
        monkeypatch.setattr(Ranks, "from_first", lambda self, compute: compute())
        found.append(make_setting(bert, small_data.folder, tmp_path, {})[1])
    monkeypatch.undo()
    count = len(whole.numbers)
    for rank, own in enumerate(found):
        rows = np.concatenate([np.arange(rank, count, 2), count + np.arange(rank, count, 2)])
        expected = whole.masked.take(rows)
        np.testing.assert_array_equal(own.masked.ids, expected.ids)
        np.testing.assert_array_equal(own.masked.labels, expected.labels)
        assert own.labels == whole.labels


def test_the_rate_rises_and_falls_linearly():
    stage = build(RecformerSettings, {"finetune": {"lr": 1.0, "warmup_steps": 4}}).finetune
    found = [linear_rate(step, 20, stage) for step in range(20)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4:] == pytest.approx([left / 16 for left in range(16, 0, -1)])
    short = [linear_rate(step, 10, stage) for step in range(10)]
    assert short[:3] == [0.5, 1.0, 1.0]
