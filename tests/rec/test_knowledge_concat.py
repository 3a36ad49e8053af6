"""The item encoder that reads a text beside the ID: what it makes of the texts it is told."""

import pytest
import torch

from rec.item_encoder import KnowledgeConcat

N = 12


def test_knowledge_starts_silent_and_can_be_learnt():
    torch.manual_seed(0)
    items = KnowledgeConcat(N, 16, 5)
    items.set_knowledge(torch.randn(N, 5))
    numbers = torch.arange(1, N + 1)
    torch.testing.assert_close(items(numbers), items.ids(numbers))
    items(numbers).square().sum().backward()
    assert items.fuse.weight.grad[:, 16:].abs().sum() > 0


@pytest.mark.parametrize("on_target", [False, True])
def test_standardised_knowledge_by_hand(on_target):
    """Mean 0 and variance 1 over the first catalog, whose scale later ones keep; no text stays nothing."""
    generator = torch.Generator().manual_seed(0)
    first = 5 + 3 * torch.randn(N, 2, generator=generator)
    first[3] = 0
    first[:, 1] *= 2
    items = KnowledgeConcat(N, 2, 2, on_target, standardise=True)
    items.set_knowledge(first)
    with torch.no_grad():
        items.ids.weight.zero_()
        items.fuse.weight.copy_(torch.cat([torch.zeros(2, 2), torch.eye(2)], dim=1))
    told = first[first.ne(0).any(1)]
    mean, deviation = told.mean(0), told.std(0)

    def by_hand(vectors):
        return torch.stack([(v - mean) / deviation if v.any() else torch.zeros(2) for v in vectors])

    read = items.table()[1:] if on_target else items(torch.arange(1, N + 1))
    torch.testing.assert_close(read, by_hand(first))
    assert read[3].tolist() == [0, 0]
    assert items(torch.tensor([0])).abs().sum() == 0
    fresh = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(items(torch.tensor([1, 2]), fresh), by_hand(fresh))
    items.set_knowledge(first * 2)
    torch.testing.assert_close(items(torch.arange(1, N + 1)), by_hand(first * 2))
    assert items.settings()["standardise"] is True


def test_an_entry_that_is_the_same_in_all_texts_is_read_as_nothing():
    items = KnowledgeConcat(N, 2, 2, standardise=True)
    items.set_knowledge(torch.stack([torch.full((N,), 7.0), torch.arange(N).float()], dim=1))
    assert items._read(items.knowledge[1:])[:, 0].abs().max() < 1e-3
    assert items._read(items.knowledge[1:]).isfinite().all()


def reading_items(**options: object) -> KnowledgeConcat:
    """Whose vectors are the ID vector of ones beside the text's one number."""
    items = KnowledgeConcat(N, 2, 1, **options)
    with torch.no_grad():
        items.ids.weight.copy_(torch.tensor([1.0, 0.0]))
        items.fuse.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 1]]))
    return items


def test_of_several_texts_training_reads_a_random_one_and_evaluation_the_first():
    items, numbers = reading_items(), torch.arange(1, N + 1)
    told = torch.arange(N)[:, None] * 10.0 + torch.arange(3)
    items.set_knowledge(told[..., None])
    torch.manual_seed(0)
    read = torch.stack([items(numbers)[:, 1] for _ in range(200)])
    for item in range(N):
        values, counts = read[:, item].unique(return_counts=True)
        assert values.tolist() == told[item].tolist()
        assert counts.min() > 40
    assert items.eval()(numbers)[:, 1].tolist() == told[:, 0].tolist()
    assert items.train()(torch.tensor([0]))[0, 1] == 0
    fresh = torch.full((N, 1), 7.0)
    assert items(numbers, fresh)[:, 1].tolist() == [7.0] * N
    assert "draws" not in items.state_dict()
    items.set_knowledge(told[:, :1])
    assert items(numbers)[:, 1].tolist() == told[:, 0].tolist()


def test_id_dropout_leaves_out_the_id_of_so_many_items_while_training_alone():
    items, numbers = reading_items(id_dropout=0.3), torch.full((4000,), 2)
    items.set_knowledge(torch.ones(N, 1))
    torch.manual_seed(0)
    read = items(numbers)
    assert set(read[:, 0].tolist()) == {0.0, 1.0}
    assert read[:, 0].mean().item() == pytest.approx(0.7, abs=0.03)
    assert (read[:, 1] == 1).all()
    assert (items.eval()(numbers)[:, 0] == 1).all()
    assert items.settings()["id_dropout"] == 0.3


def test_bad_knowledge_is_refused():
    items = KnowledgeConcat(N, 16, 5)
    with pytest.raises(ValueError, match=r"\(3, 5\), not \(12, 5\)"):
        items.set_knowledge(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="finite"):
        items.set_knowledge(torch.full((N, 5), float("nan")))
    several = torch.zeros(N, 2, 5)
    several[3, 1, 4] = float("inf")
    with pytest.raises(ValueError, match="finite"):
        items.set_knowledge(several)
