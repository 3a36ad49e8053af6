import pytest
import torch
from torch.nn import functional as F

from rec import linear_cross_entropy as module
from rec.linear_cross_entropy import linear_cross_entropy


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
def test_chunked_cross_entropy_equals_the_plain_one(monkeypatch, rows, chunk_rows):
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 50 * chunk_rows)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    torch.manual_seed(0)
    states, table = torch.randn(rows, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    targets = torch.randint(50, (rows,))
    expected = F.cross_entropy(states @ table.T, targets)
    found = linear_cross_entropy(states, table, targets)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(3 * found, (states, table)),
        torch.autograd.grad(3 * expected, (states, table)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_what_a_gpu_computes_is_the_same(monkeypatch, rows, scale):
    """On the CPU here, in several chunks, by a table whose rows are padded."""
    monkeypatch.setattr(module, "GPU_CHUNK_BYTES", 4 * 64 * 3)
    monkeypatch.setattr(module, "LEAST_ROWS", 1)
    torch.manual_seed(0)
    given = scale * torch.randn(rows, 8), torch.randn(50, 8), torch.randint(50, (rows,))
    for ours, theirs in zip(module._on_gpu(*given, True, True), module._on_cpu(*given, True, True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert module._on_gpu(*given, False, False)[1:] == (None, None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(
    ("precision", "scale", "close"),
    # Logits of hundreds are rounded to multiples of 2 and more.
    [(torch.float32, 1, 1e-4), (torch.float32, 30, 1e-4), (torch.bfloat16, 1, 1e-2), (torch.bfloat16, 30, 0.1)],
)
def test_a_gpu_computes_the_same(precision, scale, close):
    torch.manual_seed(0)
    states, table = scale * torch.randn(130, 64), torch.randn(701, 64)
    states, table = states.to(precision).float().requires_grad_(), table.to(precision).float().requires_grad_()
    targets = torch.randint(701, (130,))
    expected = F.cross_entropy(states @ table.T, targets)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision != torch.float32):
        found = linear_cross_entropy(states.cuda(), table.cuda(), targets.cuda())
    assert found.item() == pytest.approx(expected.item(), rel=close)
    for ours, theirs in zip(
        torch.autograd.grad(found, (states, table)), torch.autograd.grad(expected, (states, table)), strict=True
    ):
        assert (ours - theirs).norm() < close * theirs.norm()


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_is_frozen_costs_nothing_and_changes_nothing(precision):
    torch.manual_seed(0)
    given, targets = (torch.randn(20, 8), torch.randn(50, 8)), torch.randint(50, (20,))

    def found(*asked):
        own = [value.clone().requires_grad_(asks) for value, asks in zip(given, asked, strict=True)]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision != torch.float32):
            loss = linear_cross_entropy(*own, targets)
        if loss.requires_grad:
            loss.backward()
        return loss.detach(), *(value.grad for value in own)

    both = found(True, True)
    for asked in ((True, False), (False, True), (False, False)):
        loss, *gradients = found(*asked)
        torch.testing.assert_close(loss, both[0])
        for asks, gradient, expected in zip(asked, gradients, both[1:], strict=True):
            assert torch.equal(gradient, expected) if asks else gradient is None


def test_huge_logits_do_not_overflow():
    states, table = torch.full((2, 4), 100.0, requires_grad=True), torch.eye(4) * 100
    loss = linear_cross_entropy(states, table, torch.tensor([0, 3]))
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, states)[0]).all()


@pytest.mark.parametrize("rows", [3, 64, 130])
def test_bfloat16_is_as_exact_as_its_products(monkeypatch, rows):
    monkeypatch.setattr(module, "SLICE_ROWS", 256)  # two whole slices of the table, and a part of one
    torch.manual_seed(0)
    states, table = torch.randn(rows, 16, requires_grad=True), torch.randn(700, 16, requires_grad=True)
    targets = torch.randint(700, (rows,))
    expected = F.cross_entropy(states @ table.T, targets)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(states, table, targets)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(found, (states, table)), torch.autograd.grad(expected, (states, table)), strict=True
    ):
        assert (ours - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("scale", [0.2, 8.0])
def test_a_big_table_is_not_read_again_for_every_few_rows(monkeypatch, scale):
    """Two rows of it would fill a chunk: there are 64 at least, with and without the maximum subtracted."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 2 * 4 * 3000)
    torch.manual_seed(0)
    states, table = (scale * torch.randn(150, 8)).requires_grad_(), torch.randn(3000, 8, requires_grad=True)
    targets, products = torch.randint(3000, (150,)), []
    plain = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kw: products.append(args[0].shape) or plain(*args, **kw))
    found = linear_cross_entropy(states, table, targets)
    assert [rows for rows, inner in products if inner == 8] == [64, 64, 22]
    monkeypatch.undo()
    expected = F.cross_entropy(states @ table.T, targets)
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (states, table)), torch.autograd.grad(expected, (states, table)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
