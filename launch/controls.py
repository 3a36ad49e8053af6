"""What any recommender has to beat: popularity, and what most often came next after the same last item."""

import numpy as np
import torch
from torch import Tensor, nn

from llm.lmrec_evaluation import ReaderConfig
from rec.data.prepared import Prepared
from rec.data.splits import TRAIN
from rec.models.base import Recommender


class Popularity(Recommender):
    """Scores items by their training interactions."""

    architecture = "popularity"

    def __init__(self, data: Prepared) -> None:
        nn.Module.__init__(self)
        self.config = ReaderConfig(max_length=1)
        counts = data.train_counts[1:].float()
        # A parameter, so that the evaluator finds a device.
        self.shares = nn.Parameter(counts / (1 + counts.sum()), requires_grad=False)

    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        return self.shares.expand(len(users), -1).clone()


class Transitions(Popularity):
    """Scores items by how often they followed the history's last item in training, popularity breaking ties."""

    architecture = "last-item transitions"

    def __init__(self, data: Prepared) -> None:
        super().__init__(data)
        users = torch.repeat_interleave(torch.arange(data.n_users), data.offsets.diff())
        follows = (users[1:] == users[:-1]) & (data.part[1:] == TRAIN)
        pairs = (data.sequence[:-1][follows] - 1) * data.n_items + data.sequence[1:][follows] - 1
        keys, counts = np.unique(pairs.numpy(), return_counts=True)
        self.next, self.counts = torch.from_numpy(keys % data.n_items), torch.from_numpy(counts).float()
        self.begins = torch.from_numpy(np.searchsorted(keys // data.n_items, np.arange(data.n_items + 1)))

    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        scores = super().score_all(users, items, lengths)
        last = items[torch.arange(len(items)), lengths - 1] - 1
        for row, item in enumerate(last.tolist()):
            span = slice(int(self.begins[item]), int(self.begins[item + 1]))
            scores[row, self.next[span]] += self.counts[span]
        return scores
