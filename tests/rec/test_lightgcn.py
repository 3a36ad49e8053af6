"""LightGCN against dense matrices, its graph, and what it keeps between calls."""

from dataclasses import replace

import pytest
import torch

from rec.build import build_model
from rec.config import RecConfig
from rec.data.prepared import Prepared
from rec.data.splits import CONTEXT, TRAIN
from rec.evaluation import evaluate
from rec.item_encoder import IDTable, KnowledgeConcat
from rec.linear_cross_entropy import linear_cross_entropy
from rec.models.base import Batch, Recommender
from rec.models.lightgcn import LightGCN, LightGCNConfig
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder
from rec.trainer import train

PAIRS = {(0, 1), (0, 3), (1, 3), (1, 4), (1, 5), (3, 2), (3, 5)}  # user 2 has none, nor has item 6
USERS, N, D = 4, 6, 3
ALL = (torch.arange(USERS), torch.zeros(USERS, 1, dtype=torch.long), torch.ones(USERS, dtype=torch.long))


def model_of(**config) -> LightGCN:
    torch.manual_seed(0)
    edges = torch.tensor(sorted(user * (N + 1) + item for user, item in PAIRS))
    model = LightGCN(LightGCNConfig(dim=D, **config), IDTable(N, D), USERS, edges).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def dense_final(model: LightGCN, layers: int, combine: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A, D and Â as full matrices, and matrix powers in place of steps."""
    a = torch.zeros(USERS + N, USERS + N)
    for user, item in PAIRS:
        a[user, USERS + item - 1] = a[USERS + item - 1, user] = 1
    degree = a.sum(1)
    scale = torch.diag(torch.where(degree > 0, degree.clamp(min=1) ** -0.5, 0.0))
    normalised = scale @ a @ scale
    zero = torch.cat([model.users.weight, model.items.ids.weight[1:]])
    final = sum(torch.linalg.matrix_power(normalised, k) @ zero for k in range(layers + 1))
    final = final / (layers + 1) if combine == "mean" else final
    return final[:USERS], final[USERS:]


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_propagation_equals_dense_matrices(layers, combine):
    model = model_of(layers=layers, combine=combine)
    users, items = dense_final(model, layers, combine)
    found = model(model.layer_zero())
    torch.testing.assert_close(found[0], users)
    torch.testing.assert_close(found[1], items)
    torch.testing.assert_close(model.score_all(*ALL), users @ items.T)
    weights = torch.randn_like(users), torch.randn_like(items)
    for side in ((users, items), found):
        model.zero_grad()
        sum((vectors * weight).sum() for vectors, weight in zip(side, weights, strict=True)).backward()
        if side is not found:
            expected = [parameter.grad.clone() for parameter in model.parameters()]
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_loss_is_bpr_and_the_norm_of_what_was_drawn(monkeypatch):
    model = model_of(layers=2, l2=0.3)
    users, positives, negatives = [0, 1, 3, 1], [1, 4, 5, 3], [2, 6, 2, 1]
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor(negatives))
    targets = torch.tensor(positives)[:, None]
    found = model.training_loss(Batch(torch.tensor(users), torch.zeros_like(targets), targets), linear_cross_entropy)
    final_users, final_items = dense_final(model, 2, "mean")
    losses, penalty = [], 0
    for user, positive, negative in zip(users, positives, negatives, strict=True):
        penalty += model.users.weight[user].norm() ** 2
        penalty += model.items.ids.weight[positive].norm() ** 2 + model.items.ids.weight[negative].norm() ** 2
        if (user, negative) not in PAIRS:  # user 3 has item 2: no negative
            difference = final_users[user] @ (final_items[positive - 1] - final_items[negative - 1])
            losses.append(-difference.sigmoid().log())
    expected = sum(losses) / 3 + 0.3 / 2 * penalty / 4
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_every_parameter_gets_a_gradient_under_autocast_too():
    for enabled in (False, True):
        model = model_of().train()
        targets = torch.tensor([[1], [4]])
        batch = Batch(torch.tensor([0, 1]), torch.zeros_like(targets), targets)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            model.training_loss(batch, linear_cross_entropy).backward()
        assert all(value.grad is not None and value.grad.any() for value in model.parameters())


def config_of(**rec) -> RecConfig:
    model = {"name": "LightGCN", "dim": 16, "layers": 2}
    schedule = {"lr": 1e-2, "batch_size": 32, "epochs": 30, "patience": 30, "evaluate_every": 3}
    # Smoothing ranks a user's own items first; what there is to learn are the places beside them on the ring.
    return build(
        RecConfig, {"model": model, "train": schedule | rec.pop("train", {}), "evaluate": {"seen": "mask"}, **rec}
    )


@pytest.mark.parametrize(("on", "held_out"), [("train", 2), ("train+valid", 1)])
def test_the_graph_is_what_is_trained_on(small_data, on, held_out):
    model = build_model(config_of(train={"on": on}), small_data)
    stride = small_data.n_items + 1
    found = {(edge // stride, edge % stride) for edge in model.edges.tolist()}
    expected = set()
    bounds = small_data.offsets.tolist()
    for user in range(small_data.n_users):
        trained = small_data.sequence[bounds[user] : bounds[user + 1] - held_out].tolist()
        expected |= {(user, item) for item in trained}
    assert found == expected
    assert len(model.edges) == len(found), "each once"
    held = {(user, item) for user, item in enumerate(small_data.targets("test").tolist())} - expected
    assert held
    assert not held & found


def test_saved_and_loaded_is_the_same_model_without_the_data(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    loaded = Recommender.from_pretrained(tmp_path)
    assert torch.equal(model.score_all(*ALL), loaded.score_all(*ALL))


def test_an_evaluation_propagates_once(small_data, monkeypatch):
    config = config_of(evaluate={"batch_size": 7})
    model, calls, forward = build_model(config, small_data), [], LightGCN.forward
    monkeypatch.setattr(LightGCN, "forward", lambda self, zero: calls.append(1) or forward(self, zero))
    evaluate(model, small_data, "test", config.evaluate)
    assert len(calls) == 1


@torch.no_grad()
def test_what_is_kept_goes_when_weights_change():
    model = model_of()
    before = model.score_all(*ALL)
    assert torch.equal(model.score_all(*ALL), before)

    def fresh():
        users, items = dense_final(model, 3, "mean")
        return users @ items.T

    model.users.weight.mul_(2)
    torch.testing.assert_close(model.score_all(*ALL), fresh())
    model.load_state_dict(
        {name: value.flip(0) if name != "edges" else value for name, value in model.state_dict().items()}
    )
    torch.testing.assert_close(model.score_all(*ALL), fresh())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model.score_all(*ALL), fresh())
    model.users.weight.data = torch.randn(USERS, D)
    torch.testing.assert_close(model.score_all(*ALL), fresh())


def test_users_of_whom_nothing_is_trained_on_are_refused(small_data):
    config = build(RecConfig, {"model": {"name": "LightGCN", "dim": 8}})
    strangers = replace(small_data, part=small_data.part.masked_fill(small_data.part == TRAIN, CONTEXT))
    with pytest.raises(UserError, match="trains on none of the valid users"):
        build_model(config, strangers)


def test_another_loss_is_refused():
    with pytest.raises(UserError, match="LightGCN has a loss of its own"):
        config_of(loss={"name": "bce"})


def test_training_learns_the_ring(small_data: Prepared, tmp_path):
    config = config_of()
    before = evaluate(build_model(config, small_data), small_data, "test", config.evaluate)["HR@10"]
    trained = train(build_model(config, small_data), small_data, config, RunFolder(tmp_path), "test")
    assert evaluate(trained, small_data, "test", config.evaluate)["HR@10"] > max(0.6, before + 0.1)


def test_knowledge_of_items_takes_part():
    items = KnowledgeConcat(N, D, 5)
    items.set_knowledge(torch.randn(N, 5))
    model = LightGCN(LightGCNConfig(dim=D), items, USERS, model_of().edges)
    targets = torch.tensor([[1], [4]])
    batch = Batch(torch.tensor([0, 1]), torch.zeros_like(targets), targets)
    model.training_loss(batch, linear_cross_entropy).backward()
    assert items.fuse.weight.grad[:, D:].any()
