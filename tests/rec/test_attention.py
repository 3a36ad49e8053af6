"""Attention in the precision in which it is fast."""

import torch
from torch.nn import functional as F

from rec.attention import attention, causal_attention


def test_training_in_bfloat16_computes_attention_in_float32(monkeypatch):
    torch.manual_seed(0)
    plain, seen = F.scaled_dot_product_attention, []

    def watched(q, *inputs, **options):
        seen.append(q.dtype)
        return plain(q, *inputs, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    exact = [torch.randn(2, 3, 5, 8, requires_grad=True) for _ in range(3)]
    rounded = [value.detach().bfloat16().requires_grad_() for value in exact]
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = plain(*exact, is_causal=True)
    reference = torch.autograd.grad(expected.square().sum(), exact)
    with torch.autocast("cpu", torch.bfloat16):
        for function in (lambda *inputs: attention(*inputs, mask, 0.0), lambda *inputs: causal_attention(*inputs, 0.0)):
            found = function(*rounded)
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)
            own = torch.autograd.grad(found.float().square().sum(), rounded)
            for one, other in zip(own, reference, strict=True):
                torch.testing.assert_close(one.float(), other, rtol=0.1, atol=0.1)
        with torch.no_grad():
            causal_attention(*rounded, 0.0)
    assert seen == [torch.float32, torch.float32, torch.bfloat16]
