"""Properties of every sequence model with every item encoder."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rec.item_encoder import IDPlusVectors, IDTable, ItemEncoder, KnowledgeConcat, VectorTable
from rec.linear_cross_entropy import linear_cross_entropy
from rec.models import MODELS
from rec.models.base import Batch, SequenceRecommender
from rec.models.sasrec import SASRec, SASRecConfig
from rec.runtime.config import build
from rec.runtime.errors import UserError

N, L, D, K = 12, 6, 64, 5
MASK = N + 1

# Of every sequence model, by its name, what a small one needs besides dim and max_length.
SMALL = {
    "SASRec": {"blocks": 2, "heads": 2},
    "BERT4Rec": {"blocks": 2, "heads": 2},
    "GRU4Rec": {},
    "Caser": {"window": 4, "n_h": 3, "n_v": 2},
    "LightSANs": {"blocks": 2, "heads": 2, "inner": 24, "interests": 3},
    "PAUP": {"blocks": 2, "heads": 2, "inner": 24, "slot": 2, "segments": 2},
}
SEQUENCE_MODELS = {name: cls for name, cls in MODELS.items() if issubclass(cls, SequenceRecommender)}


def vectors(encoder: VectorTable | IDPlusVectors) -> ItemEncoder:
    encoder.set_vectors(torch.randn(N, encoder.vector_dim))
    return encoder


def knowledge(on_target: bool, standardise: bool = False) -> KnowledgeConcat:
    items = KnowledgeConcat(N, D, K, on_target=on_target, standardise=standardise)
    items.set_knowledge(torch.randn(N, K))
    torch.nn.init.normal_(items.fuse.weight, std=0.3)
    return items


ENCODERS: dict[str, Callable[[], ItemEncoder]] = {
    "id": lambda: IDTable(N, D),
    "vectors": lambda: vectors(VectorTable(N, D, D)),
    "frozen vectors": lambda: vectors(VectorTable(N, D, D, trainable=False)),
    "projected vectors": lambda: vectors(VectorTable(N, D, K, projection=True)),
    "frozen projected vectors": lambda: vectors(VectorTable(N, D, K, trainable=False, projection=True)),
    "id+vectors": lambda: vectors(IDPlusVectors(N, D, D)),
    "id+projected vectors": lambda: vectors(IDPlusVectors(N, D, K, projection=True)),
    "knowledge": lambda: knowledge(False),
    "knowledge on both sides": lambda: knowledge(True),
    "standardised knowledge": lambda: knowledge(True, standardise=True),
}

HISTORIES = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10]]


def make(name: str, encoder: str) -> SequenceRecommender:
    """Random weights, of a size at which every part of the model matters."""
    torch.manual_seed(0)
    model_class = SEQUENCE_MODELS[name]
    config = build(model_class.config_class, {"dim": D, "max_length": L, **SMALL[name]})
    model = model_class(config, ENCODERS[encoder]()).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=0.5, std=0.5)
        elif parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.15)
    return model


def padded(histories: list[list[int]], length: int | None = None) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(history) for history in histories])
    items = torch.zeros(len(histories), length or int(lengths.max()), dtype=torch.long)
    for row, history in enumerate(histories):
        items[row, : len(history)] = torch.tensor(history)
    return items, lengths


def batch_of(model: SequenceRecommender) -> Batch:
    """A training batch of the kind that the model is trained on."""
    items, lengths = padded(HISTORIES)
    targets = torch.zeros_like(items)
    if model.samples == "next-item":
        targets = items % N + (items > 0)
    elif model.samples == "prefix":
        targets[torch.arange(3), lengths - 1] = torch.tensor([7, 8, 11])
    else:
        masked = torch.zeros_like(items, dtype=torch.bool)
        masked[[0, 0, 1, 2], [1, 4, 0, 2]] = True
        items, targets = items.masked_fill(masked, MASK), items * masked
    return Batch(torch.arange(3), items, targets)


@pytest.fixture(params=list(ENCODERS))
def encoder(request) -> str:
    return request.param


@pytest.fixture(params=list(SEQUENCE_MODELS))
def model(request, encoder) -> SequenceRecommender:
    return make(request.param, encoder)


@pytest.fixture(params=[name for name, cls in SEQUENCE_MODELS.items() if cls.samples == "next-item"])
def next_item_model(request, encoder) -> SequenceRecommender:
    return make(request.param, encoder)


@pytest.fixture(params=[name for name, cls in SEQUENCE_MODELS.items() if cls.samples == "prefix"])
def prefix_model(request, encoder) -> SequenceRecommender:
    return make(request.param, encoder)


def test_every_model_is_registered_under_its_name_and_tested_here():
    assert all(name == model_class.architecture for name, model_class in MODELS.items())
    assert SMALL.keys() == SEQUENCE_MODELS.keys()


def test_a_state_depends_on_the_items_within_reach_and_on_no_others(model):
    items, lengths = torch.randint(1, N + 1, (1, L)), torch.tensor([L])
    state = model.last_states(items, lengths)
    for place in range(L):
        changed = items.clone()
        changed[0, place] = items[0, place] % N + 1
        same = torch.allclose(model.last_states(changed, lengths), state, atol=1e-6)
        assert same == (place < L - model.reach)


def test_the_future_never_changes_a_state(next_item_model):
    items = torch.randint(1, N + 1, (3, L))
    changed = items.clone()
    changed[:, 4:] = torch.randint(1, N + 1, (3, L - 4))
    torch.testing.assert_close(next_item_model(items)[:, :4], next_item_model(changed)[:, :4])


@pytest.mark.parametrize("positions", ["first", "last"])
@pytest.mark.parametrize("block", ["sasrec", "ligr"])
def test_what_a_sasrec_state_knows_of_the_future(block, positions):
    """Nothing; with positions from the last item, how many items follow, but not which."""
    torch.manual_seed(0)
    config = SASRecConfig(dim=8, heads=2, max_length=L, block=block, positions=positions)
    model = SASRec(config, IDTable(N, 8)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    items = torch.randint(1, N + 1, (3, L))
    changed = items.clone()
    changed[:, 4:] = torch.randint(1, N + 1, (3, L - 4))
    states = model(items)[:, :4]
    torch.testing.assert_close(model(changed)[:, :4], states)
    assert torch.allclose(model(items[:, :4]), states, atol=1e-5) == (positions == "first")


def test_states_at_many_places_are_those_of_each_prefix_alone(prefix_model):
    items, _ = padded(HISTORIES)
    where = torch.tensor([[1, 0, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    states = prefix_model.states_at(items, where)
    for state, (row, place) in zip(states, where.nonzero().tolist(), strict=True):
        alone = prefix_model.last_states(items[row : row + 1, : place + 1], torch.tensor([place + 1]))
        torch.testing.assert_close(state, alone[0])


def test_padding_and_batch_mates_never_change_a_score(model):
    together = model.score_all(torch.arange(3), *padded(HISTORIES))
    for row, history in enumerate(HISTORIES):
        for length in {len(history), L}:
            alone = model.score_all(torch.tensor([row]), *padded([history], length))
            torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_is_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = SequenceRecommender.from_pretrained(tmp_path)
    assert loaded.config == model.config
    batch = (torch.arange(3), *padded(HISTORIES))
    assert torch.equal(model.score_all(*batch), loaded.score_all(*batch))


def test_log_likelihood_is_a_distribution_over_items(model):
    items, lengths = torch.tensor([[3, 1, 4, 1]]), torch.tensor([4])
    total = sum(model.log_likelihood(items, lengths, torch.tensor([y])).exp() for y in range(1, N + 1))
    assert total.item() == pytest.approx(1, abs=1e-5)


def test_too_long_a_history_is_refused(model):
    with pytest.raises(ValueError, match="reads 6"):
        model.last_states(torch.ones(1, L + 1, dtype=torch.long), torch.tensor([L + 1]))


def test_training_reaches_every_parameter(model):
    """DDP waits for a gradient of each; biases may have one of zero, as attention's key bias does."""
    model.training_loss(batch_of(model), linear_cross_entropy).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.dim() == 1 or parameter.grad.abs().sum() > 0, name


def test_bf16_trains_on_nearly_the_same_loss(model):
    batch = batch_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.training_loss(batch, linear_cross_entropy)
    loss.backward()
    assert loss.item() == pytest.approx(model.training_loss(batch, linear_cross_entropy).item(), rel=0.1)


@pytest.mark.parametrize("name", list(SEQUENCE_MODELS))
@pytest.mark.parametrize("kind", ["knowledge", "knowledge on both sides"])
def test_given_knowledge_takes_the_place_of_the_stored(name, kind):
    model = make(name, kind)
    items, lengths = padded(HISTORIES)
    stored = model.items.knowledge[items]
    torch.testing.assert_close(model.last_states(items, lengths, stored), model.last_states(items, lengths))
    fresh = stored.clone()
    fresh[2, 2] += 1
    after = model.last_states(items, lengths, fresh)
    torch.testing.assert_close(after[:2], model.last_states(items, lengths)[:2])
    assert not torch.allclose(after[2], model.last_states(items, lengths)[2])
    fresh[1, 1:] = 7  # of padding
    torch.testing.assert_close(model.last_states(items, lengths, fresh), after)


@pytest.mark.parametrize("kind", ["sasrec", "ligr"])
@pytest.mark.parametrize("positions", ["first", "last"])
def test_sasrec_equals_its_equations(kind, positions):
    """Loops over positions and heads, no shared code: attention over the past, pre-norm, residuals, the FFN."""
    torch.manual_seed(2)
    config = SASRecConfig(dim=8, heads=2, blocks=2, max_length=L, block=kind, positions=positions)
    model = SASRec(config, IDTable(N, 8)).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    items = [2, 5, 9, 2]

    def norm(v, layer):
        return (v - v.mean()) / (v.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias

    def sigmoid(v):
        return 1 / (1 + (-v).exp())

    def feed_forward(v, block):
        if kind == "sasrec":
            hidden = (block.ffn_in.weight @ v + block.ffn_in.bias).clamp(min=0)
            return block.ffn_out.weight @ hidden + block.ffn_out.bias
        gate, linear = block.ffn_in.weight[:32] @ v, block.ffn_in.weight[32:] @ v
        return block.ffn_out.weight @ (gate * sigmoid(gate) * linear)

    def gate(v, layer):
        return sigmoid(layer.weight @ v + layer.bias)

    place = {"first": [0, 1, 2, 3], "last": [3, 2, 1, 0]}[positions]
    x = [model.items.ids.weight[i] * 8**0.5 + model.positions.weight[place[t]] for t, i in enumerate(items)]
    for block in model.blocks:
        normed = [norm(v, block.norm_attention) for v in x]
        q, k, v = ([block.qkv.weight[8 * j : 8 * j + 8] @ n + block.qkv.bias[8 * j : 8 * j + 8] for n in normed]
                   for j in range(3))  # fmt: skip
        for t in range(len(items)):
            heads = []
            for h in (slice(0, 4), slice(4, 8)):
                weights = torch.stack([q[t][h] @ k[s][h] / 2 for s in range(t + 1)]).softmax(0)
                heads.append(sum(w * v[s][h] for s, w in enumerate(weights)))
            attended = block.out.weight @ torch.cat(heads) + block.out.bias
            x[t] = x[t] + (gate(x[t], block.gate_attention) if kind == "ligr" else 1) * attended
        for t in range(len(items)):
            hidden = feed_forward(norm(x[t], block.norm_ffn), block)
            x[t] = x[t] + (gate(x[t], block.gate_ffn) if kind == "ligr" else 1) * hidden
    expected = torch.stack([norm(v, model.norm) for v in x])
    torch.testing.assert_close(model(torch.tensor([items + [0] * (L - 4)]))[0, :4], expected)


def test_item_dropout_leaves_out_whole_items_while_training():
    torch.manual_seed(0)
    model = SASRec(SASRecConfig(dim=8, heads=2, max_length=L, dropout=0.0, item_dropout=0.5), IDTable(N, 8))
    torch.nn.init.zeros_(model.positions.weight)
    items = torch.randint(1, N + 1, (200, L))
    seen = model.train()._inputs(items, None)
    left_out = (seen == 0).all(-1)
    assert 0.4 < left_out.double().mean() < 0.6
    assert torch.equal(seen[~left_out], model.items(items)[~left_out] * 8**0.5)
    assert not (model.eval()._inputs(items, None) == 0).all(-1).any()


@pytest.mark.parametrize("name", list(SEQUENCE_MODELS))
def test_every_model_learns_to_read_where_ids_are_left_out(name):
    """Items without ID and, at first, without weight on their knowledge are zeros, at which LayerNorm has gradients
    that Adam squares to infinity: then the weights of knowledge would never move."""
    torch.manual_seed(0)
    items = KnowledgeConcat(N, D, K, id_dropout=0.5)
    items.set_knowledge(torch.randn(N, K))
    config = build(SEQUENCE_MODELS[name].config_class, {"dim": D, "max_length": L, **SMALL[name]})
    model = SEQUENCE_MODELS[name](config, items).train()
    optimizer, before = torch.optim.Adam(model.parameters(), lr=1e-3), items.fuse.weight[:, D:].detach().clone()
    histories = [[item] for item in range(1, N)]  # of one item: nothing else can keep a state from being zeros
    for _ in range(30):
        numbers, lengths = padded(histories)
        loss = -model.log_likelihood(numbers, lengths, numbers[:, 0] % N + 1).mean()
        optimizer.zero_grad()
        loss.backward()
        assert items.fuse.weight.grad.abs().max() < 1e4
        optimizer.step()
    assert (items.fuse.weight[:, D:] - before).abs().mean() > 5e-3


def test_a_folder_without_a_recommender_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="holds no recommender"):
        SequenceRecommender.from_pretrained(tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"architecture": "Oracle"}')
    with pytest.raises(UserError, match="unknown recommender 'Oracle'"):
        SequenceRecommender.from_pretrained(tmp_path)
