"""LightSANs and PAUP against their equations, in the paper's form and in the published code's."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rec.item_encoder import IDTable
from rec.models.lightsans import LightSANs
from rec.models.paup import PAUP, DownConv, PAUPConfig
from rec.runtime.config import build
from rec.runtime.errors import UserError

N, D, H, L = 12, 32, 2, 12
HISTORIES = [[2, 5, 9, 2, 11], [7], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [3, 8, 3]]
SIZES = {LightSANs: {"interests": 3}, PAUP: {"slot": 2, "segments": 4}}


def model_of(cls, attention: str, **config):
    """Random weights, the same for both kinds of attention; padding has a vector too, as in the reference."""
    torch.manual_seed(0)
    sizes = {"dim": D, "heads": H, "inner": 24, "blocks": 2, "max_length": L, "attention": attention}
    config = build(cls.config_class, sizes | SIZES[cls] | config)
    model = cls(config, IDTable(N, D)).eval().double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model


def run(model, histories: list[list[int]]) -> Tensor:
    lengths = torch.tensor([len(history) for history in histories])
    items = torch.zeros(len(histories), int(lengths.max()), dtype=torch.long)
    for row, history in enumerate(histories):
        items[row, : len(history)] = torch.tensor(history)
    return model.last_states(items, lengths)


def linear(layer, v: Tensor) -> Tensor:
    return layer.weight @ v + layer.bias


def norm(layer, v: Tensor) -> Tensor:
    return (v - v.mean()) / (v.var(unbiased=False) + layer.eps).sqrt() * layer.weight + layer.bias


def slow_interests(theta: Tensor, rows: list[Tensor]) -> list[Tensor]:
    """k vectors: the rows, weighted by a softmax over them."""
    interests = []
    for k in range(theta.shape[1]):
        weights = torch.stack([row @ theta[:, k] for row in rows]).softmax(0)
        interests.append(sum(w * row for w, row in zip(weights, rows, strict=True)))
    return interests


def slow_segments(down: DownConv, rows: list[Tensor], reference: bool) -> list[Tensor | None]:
    """m vectors; None for a segment without an item, which only the paper's form leaves out."""
    config, channels = down.config, D // 16
    slots = []
    for s in range(config.max_length // config.slot):
        items = rows[s * config.slot : (s + 1) * config.slot]
        if not items:
            slots.append(None)
            continue
        values = []
        for c in range(channels):
            weight = down.conv1.weight[c].view(config.slot, D)
            values.append(sum(weight[a] @ item for a, item in enumerate(items)) + down.conv1.bias[c])
        slots.append(torch.stack(values).clamp(min=0))
    per_segment = math.ceil(len(slots) / config.segments)
    before = math.ceil((per_segment * config.segments - len(slots)) / 2)
    weight = down.conv2.weight.view(D, per_segment, channels)
    segments = []
    for j in range(config.segments):
        own = {a: j * per_segment - before + a for a in range(per_segment)}
        own = {a: slots[s] for a, s in own.items() if 0 <= s < len(slots) and slots[s] is not None}
        if own or reference:
            segments.append(down.conv2.bias + sum(weight[:, a] @ slot for a, slot in own.items()))
        else:
            segments.append(None)
    return segments


def softmax_of(scores: list[list[Tensor]], reference: bool) -> Tensor:
    """The published code normalises each key over the queries, the paper each query over the keys."""
    return torch.stack([torch.stack(row) for row in scores]).softmax(0 if reference else 1)


def slow_layer(layer, x: list[Tensor], positions: Tensor, reference: bool) -> list[Tensor]:
    """Loops over heads, queries and keys."""
    q, k, v = ([linear(part, row) for row in x] for part in (layer.query, layer.key, layer.value))
    if hasattr(layer, "theta_keys"):
        k_short, v_short = slow_interests(layer.theta_keys, k), slow_interests(layer.theta_values, v)
        z = [norm(layer.norm_position, positions[t]) for t in range(len(x))]
    else:
        k_short = [row for row in slow_segments(layer.down_keys, k, reference) if row is not None]
        v_short = [row for row in slow_segments(layer.down_values, v, reference) if row is not None]
        z = [norm(layer.norm_position, positions[t] + row) for t, row in enumerate(x)]
    pq, pk = ([linear(part, row) for row in z] for part in (layer.position_query, layer.position_key))
    width = D // H
    contexts = [[] for _ in x]
    for h in range(H):
        own = slice(h * width, (h + 1) * width)
        item = softmax_of([[a[own] @ b[own] / width**0.5 for b in k_short] for a in q], reference)
        again = (2 * width) ** 0.5 if reference else 1
        position = softmax_of([[a[own] @ b[own] / width**0.5 / again for b in pk] for a in pq], reference)
        for t in range(len(x)):
            context = sum(w * row[own] for w, row in zip(item[t], v_short, strict=True))
            contexts[t].append(context + sum(w * row[own] for w, row in zip(position[t], v, strict=True)))
    outputs = []
    for t, row in enumerate(x):
        hidden = norm(layer.norm_attention, row + linear(layer.out, torch.cat(contexts[t])))
        inner = linear(layer.ffn_in, hidden)
        inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
        outputs.append(norm(layer.norm_ffn, hidden + linear(layer.ffn_out, inner)))
    return outputs


def slow_state(model, history: list[int]) -> Tensor:
    reference = model.config.attention == "reference"
    read = history + [0] * (model.config.max_length - len(history)) if reference else history
    x = [norm(model.norm, model.items.ids.weight[item]) for item in read]
    for layer in model.layers:
        x = slow_layer(layer, x, model.positions.weight, reference)
    return x[len(history) - 1]


@pytest.mark.parametrize("attention", ["paper", "reference"])
@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (LightSANs, {}),
        (LightSANs, {"blocks": 1, "interests": 1}),
        (PAUP, {}),  # 6 slots, 4 segments of 2, one empty slot before: the last segment holds one slot
        (PAUP, {"blocks": 1, "slot": 1, "segments": 8}),  # 12 slots, 8 segments of 2, the first and the last without
        (PAUP, {"slot": 3, "segments": 2}),  # 4 slots, 2 segments of 2
    ],
)
def test_states_equal_the_equations(cls, config, attention):
    model = model_of(cls, attention, **config)
    expected = torch.stack([slow_state(model, history) for history in HISTORIES])
    torch.testing.assert_close(run(model, HISTORIES), expected)


@pytest.mark.parametrize("cls", [LightSANs, PAUP])
def test_padding_matters_to_the_reference_alone(cls):
    for attention in ("paper", "reference"):
        model = model_of(cls, attention)
        before = run(model, HISTORIES)
        with torch.no_grad():
            model.items.ids.weight[0] += torch.randn(D)
        after = run(model, HISTORIES)
        full = 2  # the history that fills every place
        torch.testing.assert_close(after[full], before[full])
        for row in (0, 1, 3):
            assert torch.allclose(after[row], before[row]) == (attention == "paper")


def test_max_length_matters_to_the_reference_alone():
    for attention in ("paper", "reference"):
        long, short = model_of(LightSANs, attention), model_of(LightSANs, attention, max_length=6)
        weights = long.state_dict()
        short.load_state_dict(weights | {"positions.weight": weights["positions.weight"][:6]})
        same = torch.allclose(run(long, HISTORIES[:2]), run(short, HISTORIES[:2]))
        assert same == (attention == "paper")


@pytest.mark.parametrize(("cls", "config"), [(LightSANs, {"interests": L}), (PAUP, {"slot": 1, "segments": L})])
def test_on_a_full_history_the_modes_differ_in_the_axis_of_softmax_the_scale_and_eps(cls, config):
    """Without scores to normalise every weight is 1 / L on either axis, if summaries are as long as histories."""
    paper, reference = model_of(cls, "paper", **config), model_of(cls, "reference", **config)
    assert not torch.allclose(run(paper, HISTORIES[2:3]), run(reference, HISTORIES[2:3]))
    for module in paper.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = reference.norm.eps
    for model in (paper, reference):
        for layer in model.layers:
            for part in (layer.query, layer.position_query):
                torch.nn.init.zeros_(part.weight)
                torch.nn.init.zeros_(part.bias)
    torch.testing.assert_close(run(paper, HISTORIES[2:3]), run(reference, HISTORIES[2:3]))


@pytest.mark.parametrize(("slot", "segments"), [(1, 4), (2, 4), (3, 2), (1, 8), (12, 1)])
def test_down_convolution_is_the_published_pair_of_convolutions(slot, segments):
    torch.manual_seed(0)
    config = PAUPConfig(dim=D, max_length=L, slot=slot, segments=segments)
    down, x, projection = DownConv(config), torch.randn(3, L, D), torch.nn.Linear(D, D)
    weights = [
        layer.weight.view(layer.out_features, width, -1).transpose(1, 2)
        for layer, width in ((down.conv1, slot), (down.conv2, config.slots_per_segment))
    ]
    middle = F.relu(F.conv1d(projection(x).transpose(1, 2), weights[0], down.conv1.bias, stride=slot))
    expected = F.conv1d(
        middle, weights[1], down.conv2.bias, stride=config.slots_per_segment, padding=config.slots_before
    )
    assert expected.shape == (3, D, segments)
    for inside in (None, torch.ones(3, L, dtype=torch.bool)):
        torch.testing.assert_close(down(x, projection, inside), expected.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_published_sizes_of_paup_work_and_others_are_refused():
    for max_length in (200, 150, 100, 50):
        PAUPConfig(max_length=max_length)
    with pytest.raises(UserError, match="55 is no multiple of slot 10: conv₁ would never read the newest 5 items"):
        build(PAUPConfig, {"max_length": 55})
    with pytest.raises(UserError, match="makes 5 slots, too few for 6 segments"):
        build(PAUPConfig, {"max_length": 50, "segments": 6})
