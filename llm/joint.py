"""LMRec's joint objective, L = Σ L1 + λ Σ L2 (Eq. 1 to 7): the losses as pure functions, and the module that holds
what is trained.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from llm.corpus import IGNORED, LanguageBatch
from llm.packing import Packed, hidden_states
from rec.linear_cross_entropy import linear_cross_entropy

INITIAL_STD, LEAST_DEVIATION = 0.02, 1e-2
# Nine of ten states lie where most do; three times as far as these, nothing is meant by a state's distance any more.
USUAL_SHARE, REACH_FACTOR = 0.9, 3.0
MEDIAN_STATES = 2**15  # at most, of a big catalog, are sorted to find their median
PairLoss = Literal["bce", "softmax"]
CrossEntropy = Literal["chunked", "liger"]


@dataclass(frozen=True)
class PairBatch:
    """Pairs of a user and an item, and items that the user has nothing to do with.

    Attributes:
        task: name of the recommendation task.
        histories: packed histories, with a branch for every user vector that is asked for.
        users: [P] places of these branches in the rows laid end to end.
        items: packed item texts, each with one branch at its end.
        vectors: [I] places of these.
        positives: [P] which of the I items each user took next.
        negatives: [n] which of them are negatives, shared by all pairs.
        allowed: [P, n] bool, False where a negative is none of the pair's.
        presence: [I] log of the probability that an item is here, 0 where the loss is not to be corrected for it.
    """

    task: str
    histories: Packed
    users: Tensor
    items: Packed
    vectors: Tensor
    positives: Tensor
    negatives: Tensor
    allowed: Tensor
    presence: Tensor

    def to(self, device: torch.device) -> "PairBatch":
        """The same on ``device``."""
        return PairBatch(self.task, *(value.to(device) for name, value in vars(self).items() if name != "task"))

    @property
    def tokens(self) -> int:
        """Without padding."""
        return self.histories.tokens + self.items.tokens


def pair_loss(positive: Tensor, negative: Tensor, allowed: Tensor) -> Tensor:
    """L2 of Eq. 4 and 5: the binary cross-entropy of p = 1 / (1 + exp(-<W_u z_u, W_i z_i>)), averaged over pairs.

    The paper draws negatives at random and does not say how many. Here as many pairs count with y = 0 as with y = 1; of
    the former, each is the mean over the n random items, which has the same expectation as one of them and less noise.

    Args:
        positive: [P] dot products with y = 1.
        negative: [P, n] dot products with y = 0.
        allowed: [P, n] bool, the negatives that count.
    """
    y1 = F.softplus(-positive)
    y0 = (F.softplus(negative) * allowed).sum(1) / allowed.sum(1).clamp(min=1)
    return 0.5 * (y1 + y0).mean()


def softmax_loss(positive: Tensor, negative: Tensor, allowed: Tensor) -> Tensor:
    """Instead of Eq. 5: -log softmax of the positive among itself and the negatives; shapes as in ``pair_loss``."""
    negative = negative.masked_fill(~allowed, float("-inf"))
    return (torch.cat([positive[:, None], negative], 1).logsumexp(1) - positive).mean()


def language_loss(hidden: Tensor, table: Tensor, targets: Tensor, kind: CrossEntropy = "chunked") -> Tensor:
    """L1 of Eq. 1, a mean over tokens, without ever holding all logits.

    Args:
        hidden: [M, D] states before the tokens to predict.
        table: [V, D] tied embeddings.
        targets: [M] these tokens.
        kind: ``liger`` for Liger's kernel (NVIDIA GPUs; an extra).
    """
    if kind == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(table, hidden.to(table.dtype), targets)
    return linear_cross_entropy(hidden, table, targets)


class Statistics(NamedTuple):
    """What states are standardised by.

    Attributes:
        centre: [D] their median, entry by entry.
        reach: how far from it a state may be.
        mean: [D] of the states within reach, less ``centre``.
        deviation: [D] of these.
    """

    centre: Tensor
    reach: Tensor
    mean: Tensor
    deviation: Tensor

    @classmethod
    def of(cls, states: Tensor) -> "Statistics":
        """Of states [P, D]."""
        own = states.to(torch.promote_types(states.dtype, torch.float32))
        few = own.detach()[:: max(1, -(-len(own) // MEDIAN_STATES))]
        # Sorted, because a GPU's median has no deterministic kernel.
        centre = few.sort(0).values[(len(few) - 1) // 2].clone()
        reach = REACH_FACTOR * (few - centre).norm(dim=1).quantile(USUAL_SHARE) + LEAST_DEVIATION
        near = _within_reach(own, centre, reach)
        deviation = near.std(0, correction=0) + LEAST_DEVIATION
        return cls(*(value.to(states.dtype) for value in (centre, reach, near.mean(0), deviation)))

    def within_reach(self, states: Tensor) -> Tensor:
        """[P, D] states less their centre, those too far away moved to where the reach ends."""
        return _within_reach(states, self.centre, self.reach)


def _within_reach(states: Tensor, centre: Tensor, reach: Tensor) -> Tensor:
    away = states - centre
    return away * (reach / away.norm(dim=1, keepdim=True).clamp(min=reach))


class Head(nn.Module):
    """W z of Eq. 4, for z that is standardised.

    Trained from scratch on raw states, two towers soon lose what the states of different texts differ by, and the loss
    stays at that of a constant. Therefore z is moved and scaled to mean 0 and deviation 1, entry by entry, as batch
    normalisation does: over the batch while training (a forward pass on one rank), over many histories or all items
    afterwards. W then has a bias, which on raw states the last LayerNorm's stands for: without one every item's dot
    products would have mean 0 over the batch, so that neither "most pairs are none" nor an item's popularity could be
    said. The states of [EOS] lie close together, and one that does not, hundreds of times as far away, would make the
    deviation its own and all others the same: what is farther from the median than ``REACH_FACTOR`` times what
    ``USUAL_SHARE`` of them are is moved there first. For all other states it is an affine map: the finished model is
    Eq. 4's with a bias.

    Args:
        width: d of W ∈ R^(d x d).
        standardise: False is Eq. 4 as printed.
    """

    def __init__(self, width: int, standardise: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=standardise)
        for parameter in self.linear.parameters():  # two biases of 0 would have no gradient from each other
            nn.init.normal_(parameter, std=INITIAL_STD)
        self.standardise, self.width = standardise, width
        self.statistics: Statistics | None = None

    def forward(self, states: Tensor) -> Tensor:
        """[P, D] of states [P, D]."""
        if not self.standardise:
            return self.linear(states)
        own = self.statistics or Statistics.of(states)
        return self.linear((own.within_reach(states) - own.mean) / own.deviation)

    def fix(self, states: Tensor) -> None:
        """Use the statistics of these states [P, D] from now on."""
        self.statistics = Statistics.of(states.detach())


class Heads(nn.Module):
    """W_u and W_i of one task (Eq. 4); every task has its own (Fig. 1).

    Args:
        width: d of W ∈ R^(d x d).
        standardise: see ``Head``.
    """

    def __init__(self, width: int, standardise: bool = True) -> None:
        super().__init__()
        self.user, self.item = (Head(width, standardise) for _ in range(2))


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    """Whether ``language_loss`` of a causal LM's states and output embeddings is the model's own loss."""
    ids = torch.arange(1, 13, device=model.device)[None] % model.config.get_text_config().vocab_size
    states = model.base_model(ids, use_cache=False).last_hidden_state[0, :-1]
    ours = language_loss(states, model.get_output_embeddings().weight, ids[0, 1:])
    return torch.isclose(ours.float(), model(ids, labels=ids, use_cache=False).loss.float(), rtol=1e-4).item()


class JointModel(nn.Module):
    """A decoder that all tasks share, and a pair of linear maps for each.

    Everything is computed inside ``forward``, so that engines which shard parameters see every use of one. And every
    parameter gets a gradient from every batch, be it 0: ZeRO-3 starts a step's sums with the first backward pass, and a
    parameter that joins in a later one would be added to what the last step left.

    Args:
        decoder: a causal LM with tied embeddings.
        tasks: names of the recommendation tasks.
        pairs: which L2.
        bf16: autocast the decoder to bfloat16.
        exact_head: compute the LM's cross-entropy in float32 even so.
        cross_entropy: which kernel does.
        standardise: see ``Head``.
    """

    def __init__(
        self,
        decoder: PreTrainedModel,
        tasks: Sequence[str] = (),
        pairs: PairLoss = "bce",
        bf16: bool = False,
        exact_head: bool = False,
        cross_entropy: CrossEntropy = "chunked",
        standardise: bool = True,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        self.heads = nn.ModuleDict({task: Heads(decoder.config.hidden_size, standardise) for task in tasks})
        self.pairs, self.bf16, self.exact_head, self.cross_entropy = pairs, bf16, exact_head, cross_entropy

    def forward(self, batch: LanguageBatch | PairBatch) -> Tensor:
        """L1 of a language batch, L2 of a batch of pairs: a mean over its tokens, or pairs."""
        if isinstance(batch, LanguageBatch):
            return self._language(batch) + self._nothing_of(self.heads)
        return self._pairs(batch) + self._nothing_of(task for task in self.heads if task != batch.task)

    def user_vectors(self, task: str, histories: Packed, places: Tensor, longest: int | None = None) -> Tensor:
        """[P, D] W_u z_u (Eq. 2)."""
        return self.heads[task].user(self.features(histories, places, longest))

    def item_vectors(self, task: str, items: Packed, places: Tensor, longest: int | None = None) -> Tensor:
        """[I, D] W_i z_i (Eq. 3)."""
        return self.heads[task].item(self.features(items, places, longest))

    def features(self, packed: Packed, places: Tensor, longest: int | None = None) -> Tensor:
        """[P, D] z: the last layer's state of the [EOS] tokens at ``places`` [P], in the heads' precision.

        ``longest`` is what ``hidden_states`` means by it.
        """
        with self._autocast(packed.ids):
            hidden = hidden_states(self.decoder, packed, longest)
        return hidden.flatten(0, 1)[places].to(self.decoder.dtype)

    def _language(self, batch: LanguageBatch) -> Tensor:
        table = self.decoder.get_output_embeddings().weight
        with self._autocast(batch.ids):
            if batch.packed is None:
                hidden = self.decoder.base_model(batch.ids[:, :-1], use_cache=False).last_hidden_state
            else:
                hidden = hidden_states(self.decoder, batch.packed)[:, :-1]
            wanted = batch.labels[:, 1:] != IGNORED
            hidden, targets = hidden[wanted], batch.labels[:, 1:][wanted]
            if not self.exact_head:
                return language_loss(hidden, table, targets, self.cross_entropy)
        return language_loss(hidden.float(), table.float(), targets, self.cross_entropy)

    def _pairs(self, batch: PairBatch) -> Tensor:
        longest = max(batch.histories.ids.shape[1], batch.items.ids.shape[1])
        users = self.user_vectors(batch.task, batch.histories, batch.users, longest).float()
        items = self.item_vectors(batch.task, batch.items, batch.vectors, longest).float()
        # Not items[…]: with several threads a CPU adds up what comes back for the same item in any order.
        positive = (users * F.embedding(batch.positives, items)).sum(1) - batch.presence[batch.positives]
        negative = users @ F.embedding(batch.negatives, items).T - batch.presence[batch.negatives]
        loss = pair_loss if self.pairs == "bce" else softmax_loss
        return loss(positive, negative, batch.allowed)

    def _nothing_of(self, tasks: Iterable[str]) -> Tensor | float:
        """0, with gradients of 0 for the heads of these tasks."""
        zeros = self.decoder.get_input_embeddings().weight.new_zeros(1, self.decoder.config.hidden_size)
        unused = (part for task in tasks for part in (self.heads[task].user, self.heads[task].item))
        return sum(0.0 * part.linear(zeros).sum() for part in unused)

    def _autocast(self, ids: Tensor) -> torch.autocast:
        return torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16)
