"""Caser against its equations, one window at a time."""

import pytest
import torch

from rec.item_encoder import IDTable, KnowledgeConcat
from rec.models.caser import Caser, CaserConfig
from rec.runtime.config import build
from rec.runtime.errors import UserError

N, D = 12, 8


def model_of(window: int, max_length: int = 9) -> Caser:
    torch.manual_seed(0)
    config = CaserConfig(dim=D, window=window, n_h=3, n_v=2, max_length=max_length)
    model = Caser(config, IDTable(N, D)).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    torch.nn.init.zeros_(model.items.ids.weight[0])
    return model


def slow_state(model: Caser, history: list[int]) -> torch.Tensor:
    """State [D] after ``history``: loops over filters, places and rows of one image E [W, D]."""
    window = model.config.window
    image = [torch.zeros(D, dtype=torch.float64)] * max(0, window - len(history))
    image += [model.items.ids.weight[item] * D**0.5 for item in history[-window:]]
    features = []
    for height, filters in enumerate(model.horizontal, start=1):
        for weight, bias in zip(filters.weight, filters.bias, strict=True):  # [D, h]
            values = []
            for begin in range(window - height + 1):
                total = sum(weight[:, row] @ image[begin + row] for row in range(height))
                values.append(torch.clamp(total + bias, min=0))
            features.append(max(values))
    for weight, bias in zip(model.vertical.weight, model.vertical.bias, strict=True):  # [1, W]
        for d in range(D):
            features.append(sum(weight[0, row] * image[row][d] for row in range(window)) + bias)
    z = (model.dense.weight @ torch.stack(features) + model.dense.bias).clamp(min=0)
    return model.out.weight @ z + model.out.bias


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_caser_equals_its_equations_window_by_window(window):
    """The first windows hold padding, and with it the biases of filters over nothing."""
    model, items = model_of(window), [2, 5, 9, 2, 11, 1, 7]
    states = model(torch.tensor([[*items, 0, 0], [3] + [0] * 8]))
    for place in range(len(items)):
        torch.testing.assert_close(states[0, place], slow_state(model, items[: place + 1]))
    torch.testing.assert_close(states[1, 0], slow_state(model, [3]))


@pytest.mark.parametrize("window", [1, 3, 9])
def test_the_last_state_is_computed_from_the_last_window_alone(window):
    model, items = model_of(window), torch.tensor([[2, 5, 9, 2, 11, 1, 7], [3, 4, 0, 0, 0, 0, 0], [1] + [0] * 6])
    lengths, read = torch.tensor([7, 2, 1]), []
    expected = model(items)[torch.arange(3), lengths - 1]
    plain = model.items.forward
    model.items.forward = lambda numbers, knowledge: read.append(numbers.shape[1]) or plain(numbers, knowledge)
    torch.testing.assert_close(model.last_states(items, lengths), expected)
    assert read == [min(window, 7)]


def test_a_state_reads_its_window_and_no_more():
    model = model_of(window=3)
    items = torch.tensor([[1, 2, 3, 4, 5, 6]])
    before, within = items.clone(), items.clone()
    before[0, 2], within[0, 3] = 9, 9
    torch.testing.assert_close(model(before)[0, 5], model(items)[0, 5])
    assert not torch.allclose(model(within)[0, 5], model(items)[0, 5])


def test_padding_on_either_side_is_nothing_whatever_vector_it_has():
    torch.manual_seed(0)
    items = KnowledgeConcat(N, D, 4)
    items.set_knowledge(torch.randn(N, 4))
    torch.nn.init.normal_(items.fuse.weight)
    model = Caser(CaserConfig(dim=D, max_length=9), items).eval()
    knowledge = torch.randn(1, 2, 4)
    state = model(torch.tensor([[4, 8]]), knowledge)[0, 1]
    around = torch.cat([torch.randn(1, 3, 4), knowledge, torch.randn(1, 1, 4)], dim=1)
    torch.testing.assert_close(model(torch.tensor([[0, 0, 0, 4, 8, 0]]), around)[0, 4], state)


def test_an_untrained_model_tells_histories_apart():
    """Convolutions of vectors of N(0, 0.02) as they are, and linear maps of N(0, 0.02), would leave the bias alone."""
    torch.manual_seed(0)
    model = Caser(CaserConfig(), IDTable(200, 64)).eval()
    states = model(torch.randint(1, 201, (64, 10)))[:, -1]
    assert states.std(0).mean() > 0.02


def test_a_window_longer_than_any_history_is_refused():
    with pytest.raises(UserError, match="window 10 is longer than max_length 9"):
        build(CaserConfig, {"window": 10, "max_length": 9})
