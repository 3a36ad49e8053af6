"""Properties of every sequence model with every item encoder."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file

from rec.item_encoder import IDTable, ItemEncoder, KnowledgeConcat
from rec.models import MODELS
from rec.models.base import SequenceRecommender
from rec.models.sasrec import SASRec, SASRecConfig
from rec.runtime.errors import UserError

N, L = 12, 6


def knowledge(on_target: bool) -> KnowledgeConcat:
    items = KnowledgeConcat(N, 16, 5, on_target=on_target)
    items.set_knowledge(torch.randn(N, 5))
    torch.nn.init.normal_(items.fuse.weight, std=0.3)
    return items


ENCODERS: dict[str, Callable[[], ItemEncoder]] = {
    "id": lambda: IDTable(N, 16),
    "knowledge": lambda: knowledge(False),
    "knowledge on both sides": lambda: knowledge(True),
}


@pytest.fixture(params=list(ENCODERS))
def model(request) -> SequenceRecommender:
    torch.manual_seed(0)
    return SASRec(SASRecConfig(dim=16, heads=2, blocks=2, max_length=L), ENCODERS[request.param]()).eval()


def test_the_future_never_changes_a_state(model):
    items = torch.randint(1, N + 1, (3, L))
    changed = items.clone()
    changed[:, 4:] = torch.randint(1, N + 1, (3, L - 4))
    torch.testing.assert_close(model(items)[:, :4], model(changed)[:, :4])


def test_padding_and_batch_mates_never_change_a_score(model):
    histories = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]
    batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(h) for h in histories], batch_first=True)
    together = model.last_states(batch, torch.tensor([6, 1, 3]))
    for row, history in enumerate(histories):
        alone = model.last_states(torch.tensor([history]), torch.tensor([len(history)]))
        torch.testing.assert_close(together[row : row + 1], alone)


def test_saved_and_loaded_is_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = SequenceRecommender.from_pretrained(tmp_path)
    items = torch.randint(1, N + 1, (3, L))
    assert torch.equal(model.scores(model(items)), loaded.scores(loaded(items)))


def test_log_likelihood_is_a_distribution_over_items(model):
    items, lengths = torch.tensor([[3, 1, 4, 1]]), torch.tensor([4])
    total = sum(model.log_likelihood(items, lengths, torch.tensor([y])).exp() for y in range(1, N + 1))
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_sasrec_equals_its_equations():
    """Loops over positions and heads, no shared code: attention over the past, pre-norm, residuals, ReLU FFN."""
    torch.manual_seed(2)
    model = SASRec(SASRecConfig(dim=8, heads=2, blocks=2, max_length=L), IDTable(N, 8)).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    items = [2, 5, 9, 2]

    def norm(v, layer):
        return (v - v.mean()) / (v.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias

    x = [model.items.ids.weight[i] * 8**0.5 + model.positions.weight[t] for t, i in enumerate(items)]
    for block in model.blocks:
        normed = [norm(v, block.norm_attention) for v in x]
        q, k, v = ([block.qkv.weight[8 * j : 8 * j + 8] @ n + block.qkv.bias[8 * j : 8 * j + 8] for n in normed]
                   for j in range(3))  # fmt: skip
        for t in range(len(items)):
            heads = []
            for h in (slice(0, 4), slice(4, 8)):
                weights = torch.stack([q[t][h] @ k[s][h] / 2 for s in range(t + 1)]).softmax(0)
                heads.append(sum(w * v[s][h] for s, w in enumerate(weights)))
            x[t] = x[t] + block.out.weight @ torch.cat(heads) + block.out.bias
        for t in range(len(items)):
            hidden = (block.ffn_in.weight @ norm(x[t], block.norm_ffn) + block.ffn_in.bias).clamp(min=0)
            x[t] = x[t] + block.ffn_out.weight @ hidden + block.ffn_out.bias
    expected = torch.stack([norm(v, model.norm) for v in x])
    torch.testing.assert_close(model(torch.tensor([items]))[0], expected)


def test_knowledge_starts_silent_and_can_be_learnt():
    torch.manual_seed(0)
    items = KnowledgeConcat(N, 16, 5)
    items.set_knowledge(torch.randn(N, 5))
    numbers = torch.arange(1, N + 1)
    torch.testing.assert_close(items(numbers), items.ids(numbers))
    items(numbers).square().sum().backward()
    assert items.fuse.weight.grad[:, 16:].abs().sum() > 0


def test_bad_knowledge_is_refused():
    items = KnowledgeConcat(N, 16, 5)
    with pytest.raises(ValueError, match=r"\(3, 5\), not \(12, 5\)"):
        items.set_knowledge(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="finite"):
        items.set_knowledge(torch.full((N, 5), float("nan")))


def test_a_folder_without_a_recommender_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="holds no recommender"):
        SequenceRecommender.from_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "Oracle"}')
    with pytest.raises(UserError, match="unknown recommender 'Oracle'"):
        SequenceRecommender.from_pretrained(tmp_path)


def test_too_long_a_history_is_refused(model):
    with pytest.raises(ValueError, match="reads 6"):
        model(torch.ones(1, L + 1, dtype=torch.long))


def test_every_model_is_registered_under_its_name():
    assert all(name == model_class.architecture for name, model_class in MODELS.items())
