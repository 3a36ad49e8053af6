import torch

from rec import epoch_progress
from rec.epoch_progress import EpochProgress


def test_a_long_epoch_is_told_of_now_and_then(monkeypatch):
    said = []
    told = EpochProgress(lambda done, status: said.append((done, status)), 3, 1000, "  best NDCG@10 0.0400")
    losses = [torch.tensor(value) for value in (9.0, 2.0, 4.0)]
    told.under_way(losses, 6, 10.0)
    assert said == []
    monkeypatch.setattr(epoch_progress, "TELL_EVERY_S", 0.0)
    monkeypatch.setattr(epoch_progress, "RECENT", 2)
    told.under_way(losses, 6, 10.0)
    assert said == [(3.5, "epoch 4: 50 users/s  loss 3.000  best NDCG@10 0.0400")]
    told.done(5.0, 20.0, "")
    assert said[1] == (4.0, "50 users/s  loss 5.000")
