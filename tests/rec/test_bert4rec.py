"""BERT4Rec against its equations, and the masking of its training windows."""

import pytest
import torch

from rec.batches import ClozeWindows, make_batches
from rec.build import build_model
from rec.config import RecConfig
from rec.evaluation import evaluate
from rec.item_encoder import IDTable, KnowledgeConcat
from rec.linear_cross_entropy import linear_cross_entropy
from rec.models.base import Batch, Recommender
from rec.models.bert4rec import BERT4Rec, BERT4RecConfig
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder
from rec.trainer import train

N, L, D = 12, 6, 8
MASK = N + 1


def model_of(**config) -> BERT4Rec:
    torch.manual_seed(0)
    config = BERT4RecConfig(**{"dim": D, "heads": 2, "blocks": 2, "max_length": L} | config)
    model = BERT4Rec(config, IDTable(N, config.dim)).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def slow_encoder(model: BERT4Rec, sequence: list[int]) -> torch.Tensor:
    """h^L [L, D] of one sequence without padding."""

    def norm(v, layer):
        return (v - v.mean()) / (v.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias

    def gelu(v):
        return v * (1 + torch.erf(v / 2**0.5)) / 2

    x = []
    for place, item in enumerate(sequence):
        vector = model.mask if item == MASK else model.items.ids.weight[item]
        x.append(norm(vector + model.positions.weight[place], model.norm))
    for block in model.blocks:
        q, k, v = ([block.qkv.weight[D * j : D * j + D] @ n + block.qkv.bias[D * j : D * j + D] for n in x]
                   for j in range(3))  # fmt: skip
        after = []
        for t in range(len(x)):
            heads = []
            for h in (slice(0, 4), slice(4, 8)):
                weights = torch.stack([q[t][h] @ k[s][h] / 2 for s in range(len(x))]).softmax(0)
                heads.append(sum(w * v[s][h] for s, w in enumerate(weights)))
            after.append(norm(x[t] + block.out.weight @ torch.cat(heads) + block.out.bias, block.norm_attention))
        for t, state in enumerate(after):
            hidden = gelu(block.ffn_in.weight @ state + block.ffn_in.bias)
            x[t] = norm(state + block.ffn_out.weight @ hidden + block.ffn_out.bias, block.norm_ffn)
    return torch.stack(x)


def slow_head(model: BERT4Rec, h: torch.Tensor) -> torch.Tensor:
    dense, _, layer = model.head
    state = dense.weight @ h + dense.bias
    state = state * (1 + torch.erf(state / 2**0.5)) / 2
    return (state - state.mean()) / (state.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias


def test_it_equals_its_equations_beside_padding():
    model = model_of()
    rows = [[2, MASK, 9, 2, MASK], [5, MASK, 1]]
    items = torch.tensor([rows[0], rows[1] + [0, 0]])
    encoded = [slow_encoder(model, row) for row in rows]
    for row, expected in enumerate(encoded):
        torch.testing.assert_close(model(items)[row, : len(expected)], expected)
    masked = torch.stack([slow_head(model, h) for h in (encoded[0][1], encoded[0][4], encoded[1][1])])
    torch.testing.assert_close(model.states_at(items, items == MASK), masked)
    torch.testing.assert_close(model.scores(masked)[:, 4], masked @ model.items.ids.weight[5])


@pytest.mark.parametrize(
    ("history", "read"),
    [
        ([3], [3, MASK]),
        ([3, 1, 4], [3, 1, 4, MASK]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, MASK]),
        ([1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, MASK]),
    ],
)
def test_a_history_is_scored_at_a_mask_after_it(history, read):
    model = model_of()
    expected = slow_head(model, slow_encoder(model, read)[-1])
    state = model.last_states(torch.tensor([history]), torch.tensor([len(history)]))
    torch.testing.assert_close(state[0], expected)


def test_padding_and_batch_mates_never_change_a_score():
    model = model_of()
    histories = [[1, 2, 3, 4, 5, 6], [7], [8, 9, 10], [4, 3, 2, 1, 5]]
    batch = torch.nn.utils.rnn.pad_sequence([torch.tensor(h) for h in histories], batch_first=True)
    together = model.score_all(torch.zeros(4), batch, torch.tensor([6, 1, 3, 5]))
    for row, history in enumerate(histories):
        alone = model.score_all(torch.zeros(1), torch.tensor([history]), torch.tensor([len(history)]))
        torch.testing.assert_close(together[row : row + 1], alone)


def test_the_mask_has_no_knowledge_and_items_keep_theirs_when_the_oldest_goes():
    items = KnowledgeConcat(N, D, 5)
    items.set_knowledge(torch.randn(N, 5))
    torch.nn.init.normal_(items.fuse.weight, std=0.3)
    model = BERT4Rec(BERT4RecConfig(dim=D, max_length=L), items).eval()
    for history in ([1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]):
        sequence = torch.tensor([history])
        lengths = (sequence > 0).sum(1)
        stored = model.last_states(sequence, lengths)
        torch.testing.assert_close(model.last_states(sequence, lengths, items.knowledge[sequence]), stored)
    masked = torch.tensor([[1, MASK, 3]])
    one, other = torch.randn(1, 3, 5), torch.randn(1, 3, 5)
    other[:, [0, 2]] = one[:, [0, 2]]
    torch.testing.assert_close(model(masked, one), model(masked, other))


def test_saved_and_loaded_is_the_same_model(tmp_path):
    model = model_of().float()
    model.save_pretrained(tmp_path)
    users, items, lengths = torch.zeros(3), torch.randint(1, N + 1, (3, L)), torch.tensor([6, 6, 6])
    loaded = Recommender.from_pretrained(tmp_path)
    assert torch.equal(model.score_all(users, items, lengths), loaded.score_all(users, items, lengths))


def test_every_parameter_gets_a_gradient():
    model = BERT4Rec(BERT4RecConfig(dim=D, max_length=L), IDTable(N, D))
    items, targets = torch.tensor([[1, MASK, 3, 4], [5, 6, MASK, 0]]), torch.tensor([[0, 2, 0, 0], [0, 0, 7, 0]])
    model.training_loss(Batch(torch.zeros(2), items, targets), linear_cross_entropy).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="not divisible by heads 3"):
        build(RecConfig, {"model": {"name": "BERT4Rec", "heads": 3}})
    with pytest.raises(UserError, match="max_length"):
        build(RecConfig, {"model": {"name": "BERT4Rec", "max_length": 1}})
    with pytest.raises(ValueError, match="reads 6"):
        model_of().last_states(torch.ones(1, L + 1, dtype=torch.long), torch.tensor([L + 1]))


def cloze(data, ratio: float, last_only: float, max_length: int = 5) -> list[Batch]:
    windows = ClozeWindows.of(data, "train", max_length, 16, data.n_items + 1, ratio, last_only)
    return [batch for epoch in range(60) for batch in windows.epoch(0, epoch)]


@pytest.mark.parametrize("max_length", [2, 5, 100])
def test_a_masked_item_is_the_target_and_nothing_else_is(small_data, max_length):
    mask = small_data.n_items + 1
    for batch in cloze(small_data, 0.3, 0.2, max_length):
        masked = batch.items == mask
        assert torch.equal(masked, batch.targets > 0)
        assert masked.any(1).all(), "every window teaches something"
        assert batch.targets.max() <= small_data.n_items
        assert batch.items.shape[1] <= max_length
        inside = batch.items > 0
        assert (inside.int().diff(dim=1) <= 0).all(), "padding is on the right"


def test_windows_without_their_masks_are_the_training_parts(small_data):
    windows = ClozeWindows.of(small_data, "train", 5, 16, small_data.n_items + 1, 0.5, 0.1)
    found = {user: [] for user in range(small_data.n_users)}
    for batch in windows.epoch(3, 1):
        for user, items, targets in zip(batch.users.tolist(), batch.items, batch.targets, strict=True):
            whole = torch.where(targets > 0, targets, items)
            found[user].append(whole[whole > 0].tolist())
    starts, ends = small_data.offsets.tolist(), small_data.train_ends.tolist()
    for user, windows_of_user in found.items():
        training = small_data.sequence[starts[user] : ends[user]].tolist()
        # Cut from the end, so that every window but the oldest is full.
        cuts = [training[max(0, end - 5) : end] for end in range(len(training), 0, -5)]
        assert sorted(windows_of_user) == sorted(cuts)


def test_masks_come_in_the_shares_that_are_asked_for(small_data):
    mask = small_data.n_items + 1
    # 12 training items a user, in one window: at ratio 0.3 none at all is masked once in 72 windows.
    batches = cloze(small_data, 0.3, 0.0, max_length=12)
    masked = torch.cat([batch.items for batch in batches]) == mask
    none = 0.7**12
    assert masked.float().mean().item() == pytest.approx(0.3 + none / 12, abs=0.01)
    places = masked.float().mean(0)
    assert places[:-1].sub(0.3).abs().max() < 0.04, "every place alike"

    batches = cloze(small_data, 0.3, 0.4, max_length=12)
    masked = torch.cat([batch.items for batch in batches]) == mask
    last_alone = (masked.sum(1) == 1) & masked[:, -1]
    by_chance = 0.3 * 0.7**11 + none
    assert last_alone.float().mean().item() == pytest.approx(0.4 + 0.6 * by_chance, abs=0.03)
    assert all((batch.items[:, -1] == mask).all() for batch in cloze(small_data, 0.3, 1.0, max_length=12))


def test_masks_are_a_function_of_seed_and_epoch(small_data):
    windows = ClozeWindows.of(small_data, "train", 5, 16, small_data.n_items + 1, 0.3, 0.1)
    runs = [[batch.items.tolist() for batch in windows.epoch(*key)] for key in ((0, 1), (0, 2), (1, 1), (0, 1))]
    assert runs[0] == runs[3]
    assert runs[0] != runs[1]
    assert runs[0] != runs[2]


@pytest.fixture
def one_thread():
    """Threads that wait for each other on a busy machine take ten times as long over such small tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_learns_the_ring(small_data, tmp_path, one_thread):
    model = {"name": "BERT4Rec", "dim": 32, "blocks": 1, "heads": 1, "max_length": 8, "dropout": 0, "mask_ratio": 0.3}
    schedule = {"lr": 5e-3, "batch_size": 40, "epochs": 80, "patience": 8, "evaluate_every": 10}
    config = build(RecConfig, {"model": model, "train": schedule})
    untrained = build_model(config, small_data)
    assert isinstance(make_batches(untrained, small_data, config.train), ClozeWindows)
    before = evaluate(untrained, small_data, "test", config.evaluate)["HR@10"]
    trained = train(untrained, small_data, config, RunFolder(tmp_path), "test")
    assert evaluate(trained, small_data, "test", config.evaluate)["HR@10"] > max(0.55, before + 0.1)
