"""Log-probs and divergences in chunks against the plain formulas, forwards and backwards."""

import pytest
import torch

from align import logprobs
from align.logprobs import scored


def plain(logits: torch.Tensor, next_ids: torch.Tensor, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_p, log_orig = logits.log_softmax(-1), reference.log_softmax(-1)
    return log_p.gather(-1, next_ids[:, None]).squeeze(-1), (log_p.exp() * (log_p - log_orig)).sum(-1)


@pytest.fixture(params=[1, 7, 10**6], ids=lambda rows: f"{rows} rows a chunk")
def chunked(request, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", request.param * 8 * 50)


@pytest.mark.usefixtures("chunked")
@pytest.mark.parametrize("places", [0, 1, 20])
@pytest.mark.parametrize("exact", [True, False])
def test_values_and_gradients_are_those_of_the_plain_formulas(places, exact):
    generator = torch.Generator().manual_seed(places)
    values, other = (4 * torch.randn(places, 50, generator=generator).double() for _ in range(2))
    next_ids = torch.randint(50, (places,), generator=generator)
    by_chosen, by_kl = (torch.randn(places, generator=generator).double() for _ in range(2))
    found, expected = values.clone().requires_grad_(), values.clone().requires_grad_()
    chosen, kl = scored(found, next_ids, other if exact else None)
    plain_chosen, plain_kl = plain(expected, next_ids, other if exact else expected.detach())
    torch.testing.assert_close(chosen, plain_chosen)
    torch.testing.assert_close(kl, plain_kl)
    (chosen @ by_chosen + kl @ by_kl).backward()
    (plain_chosen @ by_chosen + (plain_kl @ by_kl if exact else 0)).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_large_logits_do_not_overflow():
    logits = torch.tensor([[1e4, 0.0, -1e4]], requires_grad=True)
    chosen, kl = scored(logits, torch.tensor([1]), torch.tensor([[0.0, 1e4, 0.0]]))
    assert (chosen.item(), kl.item()) == (-1e4, 1e4)
    (chosen + kl).sum().backward()
    assert torch.isfinite(logits.grad).all()


@pytest.mark.usefixtures("chunked")
def test_nothing_of_the_size_of_all_logits_is_kept_but_these():
    """Of both models, and nothing else: the plain formulas keep three more."""
    logits, reference = torch.randn(20, 50, requires_grad=True), torch.randn(20, 50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        scored(logits, torch.zeros(20, dtype=torch.long), reference)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() == logits.numel()} == {
        logits.data_ptr(), reference.data_ptr(),
    }  # fmt: skip
