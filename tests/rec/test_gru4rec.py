"""GRU4Rec against its equations."""

import torch

from rec.build import build_model
from rec.config import RecConfig
from rec.evaluation import evaluate
from rec.item_encoder import IDTable
from rec.linear_cross_entropy import linear_cross_entropy
from rec.models.base import Batch, Recommender
from rec.models.gru4rec import GRU4Rec, GRU4RecConfig
from rec.runtime.config import build
from rec.runtime.runfolder import RunFolder
from rec.trainer import train

N, L, D, H = 12, 6, 4, 5


def model_of() -> GRU4Rec:
    torch.manual_seed(0)
    model = GRU4Rec(GRU4RecConfig(dim=D, hidden=H, layers=2, max_length=L), IDTable(N, D)).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def test_it_equals_its_equations():
    """h = (1 - z) n + z h with r, z = σ(W x + U h) and n = tanh(W x + r ∘ U h), one step and layer at a time."""
    model, gru = model_of(), model_of().gru
    items = [2, 5, 9, 2]
    x = [model.items.ids.weight[item] * 2 for item in items]
    for layer in range(2):
        w, u, w_bias, u_bias = (
            getattr(gru, f"{name}_l{layer}").split(H) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        h, states = torch.zeros(H, dtype=torch.double), []
        for vector in x:
            r, z = (torch.sigmoid(w[j] @ vector + w_bias[j] + u[j] @ h + u_bias[j]) for j in range(2))
            n = torch.tanh(w[2] @ vector + w_bias[2] + r * (u[2] @ h + u_bias[2]))
            h = (1 - z) * n + z * h
            states.append(h)
        x = states
    expected = torch.stack([model.out.weight @ h + model.out.bias for h in x])
    torch.testing.assert_close(model(torch.tensor([items]))[0], expected)
    scores = model.score_all(torch.zeros(1), torch.tensor([items]), torch.tensor([4]))
    torch.testing.assert_close(scores[0], model.items.ids.weight[1:] @ expected[-1])


def test_the_future_never_changes_a_state():
    model = model_of()
    items = torch.randint(1, N + 1, (3, L))
    changed = items.clone()
    changed[:, 4:] = torch.randint(1, N + 1, (3, L - 4))
    torch.testing.assert_close(model(items)[:, :4], model(changed)[:, :4])


def test_padding_and_batch_mates_never_change_a_score():
    model = model_of()
    histories = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
    batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(h) for h in histories], batch_first=True)
    together = model.score_all(torch.zeros(3), batch, torch.tensor([6, 1, 3]))
    for row, history in enumerate(histories):
        alone = model.score_all(torch.zeros(1), torch.tensor([history]), torch.tensor([len(history)]))
        torch.testing.assert_close(together[row : row + 1], alone)


def test_saved_and_loaded_is_the_same_model(tmp_path):
    model = model_of().float()
    model.save_pretrained(tmp_path)
    items = torch.randint(1, N + 1, (3, L))
    assert torch.equal(model(items), Recommender.from_pretrained(tmp_path)(items))


def test_every_parameter_gets_a_gradient():
    model = GRU4Rec(GRU4RecConfig(dim=D, layers=2, max_length=L), IDTable(N, D))
    batch = Batch(torch.zeros(2), torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[2, 3, 4], [5, 6, 0]]))
    model.training_loss(batch, linear_cross_entropy).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_training_learns_the_ring(small_data, tmp_path):
    model = {"name": "GRU4Rec", "dim": 16, "hidden": 32, "max_length": 8}
    schedule = {"lr": 1e-2, "batch_size": 8, "epochs": 12, "patience": 12}
    config = build(RecConfig, {"model": model, "train": schedule})
    before = evaluate(build_model(config, small_data), small_data, "test", config.evaluate)["HR@10"]
    trained = train(build_model(config, small_data), small_data, config, RunFolder(tmp_path), "test")
    assert evaluate(trained, small_data, "test", config.evaluate)["HR@10"] > max(0.6, before + 0.1)
