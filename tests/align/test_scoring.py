import torch

from align.scoring import Inputs, knowledge_with_fresh, log_p_y_given_xs
from rec.item_encoder import KnowledgeConcat
from rec.models.sasrec import SASRec, SASRecConfig


def inputs(fresh_dim: int) -> Inputs:
    return Inputs(
        items=torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]]),
        lengths=torch.tensor([4, 2, 1]),
        targets=torch.tensor([5, 1, 2]),
        fresh=torch.arange(3 * 2 * fresh_dim).reshape(3, 2, fresh_dim).float(),
        fresh_counts=torch.tensor([2, 2, 1]),
    )


def test_fresh_texts_land_on_the_last_items():
    stored, batch = 100 + torch.arange(8)[:, None].expand(8, 3).float(), inputs(3)
    found = knowledge_with_fresh(stored, batch)
    for row in range(3):
        length, count = int(batch.lengths[row]), int(batch.fresh_counts[row])
        for place in range(length):
            nth = place - (length - count)
            expected = batch.fresh[row, nth] if nth >= 0 else stored[batch.items[row, place]]
            torch.testing.assert_close(found[row, place], expected)


def test_stored_vectors_as_fresh_ones_change_nothing():
    torch.manual_seed(0)
    items = KnowledgeConcat(8, 16, 3)
    items.set_knowledge(torch.randn(8, 3))
    torch.nn.init.normal_(items.fuse.weight)
    model = SASRec(SASRecConfig(dim=16, heads=2, max_length=4), items).eval()
    batch = inputs(3)
    last = [batch.items[row, : int(batch.lengths[row])][-2:] for row in range(3)]
    fresh = torch.zeros(3, 2, 3)
    for row, own in enumerate(last):
        fresh[row, : len(own)] = items.knowledge[own]
    same = Inputs(batch.items, batch.lengths, batch.targets, fresh, batch.fresh_counts)
    plain = model.log_likelihood(batch.items, batch.lengths, batch.targets)
    torch.testing.assert_close(log_p_y_given_xs(model, same), plain)
    assert not torch.allclose(log_p_y_given_xs(model, batch), plain)
