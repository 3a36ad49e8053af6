"""RECFORMER as a recommender: the cosine of a history's vector with every item's, ranked by rec's own evaluation."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from llm.recformer.batches import SequenceMaker
from llm.recformer.model import RecformerModel
from llm.recformer.objective import Parts, encode
from rec.data.prepared import Prepared
from rec.evaluation import Metrics, evaluate_many
from rec.models.base import Recommender
from rec.protocol import Part, Protocol
from rec.runtime.config import Section
from rec.runtime.ranks import Ranks

VECTORS = "item_vectors.safetensors"


class Reads(Section):
    """What evaluation asks a recommender's config for."""

    max_length: int
    """Longest history that is read, in items."""


class RecformerRecommender(Recommender):
    """Scores cos(s, x) / τ of a history's vector s and the item table's rows x (RECFORMER, Eq. 6).

    Args:
        model: the encoder; shared, not copied.
        table: [N, D] item vectors.
        maker: of the catalog's token sequences.
        parts: how they go through the encoder.
    """

    architecture = "RECFORMER"

    def __init__(self, model: RecformerModel, table: Tensor, maker: SequenceMaker, parts: Parts) -> None:
        super().__init__(Reads(max_length=maker.size.max_items), items=None)
        self.model, self.maker, self.parts = model, maker, parts
        self.temperature = model.config.temperature
        self.register_buffer("table", F.normalize(table.float(), dim=-1), persistent=False)

    def score_all(self, users: Tensor, items: Tensor, lengths: Tensor) -> Tensor:
        histories = [row[:length] for row, length in zip(items.cpu().numpy(), lengths.tolist(), strict=True)]
        states = encode(self.model, self.maker(histories), self.parts)
        return F.normalize(states, dim=-1) @ self.table.T / self.temperature


def evaluate_on_all_ranks(
    model: Recommender,
    data: Prepared,
    part: Part,
    protocols: Mapping[str, Protocol],
    batch_size: int,
    instances: Tensor | None = None,
) -> dict[str, Metrics]:
    """``evaluate_many`` with the instances shared out over the ranks; the same result on all of them."""
    ranks = Ranks.current()
    chosen = torch.arange(len(data.instances(part)[1])) if instances is None else instances
    is_warm = data.train_counts[data.targets(part)[chosen]] > 0
    if ranks.size == 1 or is_warm.sum() < ranks.size:
        return evaluate_many(model, data, part, protocols, batch_size, chosen)
    # Every rank has a warm target: one that has none is refused where cold ones are left out.
    shared = torch.cat([chosen[is_warm], chosen[~is_warm]])
    own = evaluate_many(model, data, part, protocols, batch_size, shared[ranks.rank :: ranks.size])
    everyone: list[dict[str, Metrics]] = [{} for _ in range(ranks.size)]
    torch.distributed.all_gather_object(everyone, own)
    return {name: _joined([found[name] for found in everyone]) for name in protocols}


def _joined(found: list[Metrics]) -> Metrics:
    instances = torch.cat([metrics.instances for metrics in found])
    order = instances.argsort()
    ranks, users = (torch.cat([getattr(metrics, name) for metrics in found])[order] for name in ("ranks", "users"))
    return Metrics(ranks, found[0].cutoffs, instances[order], users)
