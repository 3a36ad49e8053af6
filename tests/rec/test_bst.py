"""BST against its equations, and the cost of ranking with it."""

import pytest
import torch

from rec.build import build_model
from rec.config import RecConfig
from rec.evaluation import evaluate
from rec.item_encoder import IDTable, KnowledgeConcat
from rec.linear_cross_entropy import linear_cross_entropy
from rec.models import bst
from rec.models.base import Batch, Recommender
from rec.models.bst import BST, BSTConfig
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder
from rec.trainer import train

N, L, D, P = 12, 6, 5, 3
HISTORIES = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10, 9]]
ITEMS = torch.nn.utils.rnn.pad_sequence([torch.tensor(history) for history in HISTORIES], batch_first=True)
LENGTHS = torch.tensor([len(history) for history in HISTORIES])


def model_of(blocks: int) -> BST:
    torch.manual_seed(0)
    config = BSTConfig(dim=D, position_dim=P, heads=2, blocks=blocks, mlp=(7, 6), max_length=L)
    model = BST(config, IDTable(N, D)).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def slow_logit(model: BST, history: list[int], candidate: int) -> torch.Tensor:
    """One candidate: the whole sequence with it at the end through every block, then the MLP."""

    def norm(v, layer):
        return (v - v.mean()) / (v.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias

    def leaky(v):
        return torch.where(v > 0, v, 0.01 * v)

    sequence, width = [*history, candidate], D + P
    x = [
        torch.cat([model.items.ids.weight[item], model.positions.weight[len(history) - place]])
        for place, item in enumerate(sequence)
    ]
    for block in model.blocks:
        q = [block.query.weight @ v + block.query.bias for v in x]
        both = [block.key_value.weight @ v + block.key_value.bias for v in x]
        k, v = [b[:width] for b in both], [b[width:] for b in both]
        after = []
        for t in range(len(x)):
            heads = []
            for h in (slice(0, 4), slice(4, 8)):
                weights = torch.stack([q[t][h] @ k[s][h] / 2 for s in range(len(x))]).softmax(0)
                heads.append(sum(w * v[s][h] for s, w in enumerate(weights)))
            after.append(norm(x[t] + block.out.weight @ torch.cat(heads) + block.out.bias, block.norm_attention))
        inner, outer = block.ffn[0], block.ffn[2]
        x = [norm(s + outer.weight @ leaky(inner.weight @ s + inner.bias) + outer.bias, block.norm_ffn) for s in after]
    state = x[-1]
    for layer in list(model.mlp)[:-1:2]:
        state = leaky(layer.weight @ state + layer.bias)
    return (model.mlp[-1].weight @ state + model.mlp[-1].bias)[0]


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_it_equals_its_equations_beside_padding(blocks):
    model = model_of(blocks)
    candidates = torch.tensor([[3, 12], [7, 1], [5, 9]])
    expected = [
        slow_logit(model, history, candidate)
        for history, row in zip(HISTORIES, candidates, strict=True)
        for candidate in row.tolist()
    ]
    torch.testing.assert_close(model(ITEMS, candidates), torch.stack(expected).view(3, 2))


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("rows", [1, 20, 10_000])
def test_scoring_all_equals_a_loop_over_candidates_whatever_the_chunks(blocks, rows, monkeypatch):
    monkeypatch.setattr(bst, "SCORED_ROWS", rows)
    model = model_of(blocks)
    seen = []
    model.mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].numel() // (D + P)))
    scores = model.score_all(torch.zeros(3), ITEMS, LENGTHS)
    assert scores.shape == (3, N)
    assert max(seen) <= max(rows, len(ITEMS)), "candidates in memory at a time"
    for row, history in enumerate(HISTORIES):
        for candidate in range(1, N + 1):
            alone = model(torch.tensor([history]), torch.tensor([[candidate]]))
            torch.testing.assert_close(scores[row, candidate - 1], alone[0, 0])


def test_the_loss_is_cross_entropy_over_the_true_item_and_its_negatives(monkeypatch):
    model = model_of(1)
    drawn = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 11, 10, 12]])
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: drawn)
    targets = torch.zeros_like(ITEMS)
    targets[torch.arange(3), LENGTHS - 1] = torch.tensor([9, 6, 2])
    found = model.training_loss(Batch(torch.zeros(3), ITEMS, targets), linear_cross_entropy)
    expected = 0
    for row, target in enumerate([9, 6, 2]):
        losses = [-slow_logit(model, HISTORIES[row], target).sigmoid().log()]
        for negative in drawn[row].tolist():
            if negative != target:  # 6 was drawn for 6: no negative
                losses.append(-(1 - slow_logit(model, HISTORIES[row], negative).sigmoid()).log())
        expected += sum(losses) / 5 / 3
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_saved_and_loaded_is_the_same_model(tmp_path):
    model = model_of(2).float()
    model.save_pretrained(tmp_path)
    loaded, users = Recommender.from_pretrained(tmp_path), torch.zeros(3)
    assert torch.equal(model.score_all(users, ITEMS, LENGTHS), loaded.score_all(users, ITEMS, LENGTHS))


@pytest.mark.parametrize("blocks", [1, 2])
def test_every_parameter_gets_a_gradient(blocks):
    model = model_of(blocks).train()
    model.training_loss(Batch(torch.zeros(3), ITEMS, ITEMS), linear_cross_entropy).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


def config_of(**rec) -> RecConfig:
    model = {"name": "BST", "dim": 32, "position_dim": 8, "heads": 2, "max_length": 3, "mlp": [32, 16], "dropout": 0}
    schedule = {"lr": 5e-3, "batch_size": 16, "epochs": 14, "patience": 7, "evaluate_every": 2}
    return build(RecConfig, {"model": model, "train": schedule, **rec})


def test_another_loss_is_refused():
    with pytest.raises(UserError, match="BST has a loss of its own"):
        config_of(loss={"name": "bpr"})


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(UserError, match="not divisible by heads 7"):
        build(RecConfig, {"model": {"name": "BST", "heads": 7}})


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine take ten times as long over such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_learns_the_ring(small_data, tmp_path, one_thread):
    config = config_of()
    before = evaluate(build_model(config, small_data), small_data, "test", config.evaluate)["HR@10"]
    trained = train(build_model(config, small_data), small_data, config, RunFolder(tmp_path), "test")
    assert evaluate(trained, small_data, "test", config.evaluate)["HR@10"] > max(0.55, before + 0.1)


def test_candidates_carry_knowledge_only_if_asked_and_never_lose_their_ids():
    for on_target in (False, True):
        torch.manual_seed(0)
        items = KnowledgeConcat(N, D, 4, on_target=on_target, id_dropout=1.0)
        model = BST(BSTConfig(dim=D, position_dim=P, heads=2, mlp=(7,), max_length=L), items).eval()
        torch.nn.init.normal_(items.fuse.weight)
        torch.nn.init.normal_(items.ids.weight)
        told = torch.randn(N, 4)
        items.set_knowledge(told)
        before = model.score_all(torch.zeros(3), ITEMS, LENGTHS)
        told[11] += 1.0  # of item 12, which no history holds
        items.set_knowledge(told)
        moved = (model.score_all(torch.zeros(3), ITEMS, LENGTHS) - before).abs().amax(0)
        assert moved[:11].max() == 0
        assert bool(moved[11] > 0) == on_target
        model.train()
        other = model.rate(*model.read(ITEMS), items.table()[torch.tensor([[1, 2]] * 3)])
        assert not torch.equal(other[:, 0], other[:, 1])
