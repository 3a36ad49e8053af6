"""Several documents in one row, none of which sees another.

The rule of attention is one line: a token sees itself and the earlier places of its own document. It also lets a
document end in several places at once: a *branch* is an [EOS] token that stands after the first p tokens of its
document and that no other token sees, so that one pass over a history gives the state of [EOS] after every prefix that
is asked for, each exactly what a pass over that prefix alone would give.

transformers builds such a mask from ``position_ids`` only if it is given neither a mask nor a cache; with its default
arguments documents see each other. Here the mask is always explicit.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llm.end_to_end import NAME, attends_plainly, bounds, has_flash
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)

PADDING = -1
# Up to this length plain products beat the CPU's fused attention, which is slow backwards; beyond it they need too
# much memory.
LONGEST_EAGER = 1024


@dataclass(frozen=True)
class Packed:
    """Rows of documents.

    Attributes:
        ids: [B, T] tokens.
        documents: [B, T] number of the document within its row, ``PADDING`` where there is none.
        positions: [B, T] place within the document; of a branch, how many tokens stand before it.
        branches: [B, T] bool, [EOS] tokens that no other token sees; None if there are none.
    """

    ids: Tensor
    documents: Tensor
    positions: Tensor
    branches: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Without padding."""
        return int((self.documents != PADDING).sum())

    def mask(self) -> Tensor:
        """[B, 1, T, T] bool, which key (last) each query sees; padding sees itself."""
        same = self.documents[:, :, None] == self.documents[:, None, :]
        visible = same & (self.positions[:, None, :] < self.positions[:, :, None])
        if self.branches is not None:
            visible &= ~self.branches[:, None, :]
        visible |= torch.eye(self.ids.shape[1], dtype=torch.bool, device=self.ids.device)
        return visible[:, None]

    def bounds(self) -> Tensor:
        """[documents + 1] int32 where the documents of all rows begin, in rows laid end to end; padding is one too."""
        first = torch.ones_like(self.documents, dtype=torch.bool)
        first[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        begins = torch.nonzero(first.flatten()).squeeze(1)
        return torch.cat([begins, begins.new_tensor([self.ids.numel()])]).int()

    def to(self, device: torch.device) -> "Packed":
        """The same on ``device``."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return replace(self, **moved)


@dataclass(frozen=True)
class Document:
    """One text to be packed.

    Attributes:
        ids: [n] tokens.
        branches: how many tokens stand before each branch.
    """

    ids: Sequence[int]
    branches: Sequence[int] = ()

    def __len__(self) -> int:
        return len(self.ids) + len(self.branches)


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int, window: int = 4096) -> list[list[int]]:
    """Which documents share a row: the longest first, each into the fullest row that still has room.

    Args:
        lengths: of documents, none above ``capacity``.
        capacity: of a row.
        window: documents that are packed together, so that the time stays linear in their number.
    """
    rows: list[list[int]] = []
    for begin in range(0, len(lengths), window):
        by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows of this window, by the room that is left
        order = sorted(range(begin, min(begin + window, len(lengths))), key=lambda number: -lengths[number])
        for number in order:
            size = int(lengths[number])
            room = next((left for left in range(size, capacity + 1) if by_room[left]), None)
            if room is None:
                room = capacity
                by_room[room].append(len(rows))
                rows.append([])
            row = by_room[room].pop()
            rows[row].append(number)
            by_room[room - size].append(row)
    return rows


def pack(documents: Sequence[Document], rows: Sequence[Sequence[int]], eos: int, length: int | None = None) -> Packed:
    """Lay documents out in rows.

    Args:
        documents: all of them.
        rows: which of them are in each row, as ``best_fit`` returns.
        eos: the token of branches and of padding.
        length: of a row; by default the longest one's.
    """
    longest = max((sum(len(documents[number]) for number in row) for row in rows), default=1)
    shape = len(rows), length or max(1, longest)
    ids, numbers = np.full(shape, eos, dtype=np.int64), np.full(shape, PADDING, dtype=np.int64)
    positions, branches = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
    for row, own in enumerate(rows):
        place = 0
        for nth, number in enumerate(own):
            document = documents[number]
            middle, end = place + len(document.ids), place + len(document)
            ids[row, place:middle] = document.ids
            positions[row, place:middle] = np.arange(middle - place)
            positions[row, middle:end], branches[row, middle:end] = document.branches, True
            numbers[row, place:end] = nth
            place = end
    given = torch.from_numpy(branches) if branches.any() else None
    return Packed(torch.from_numpy(ids), torch.from_numpy(numbers), torch.from_numpy(positions), given)


def places_of_branches(documents: Sequence[Document], rows: Sequence[Sequence[int]], length: int) -> Tensor:
    """[branches] where the branches of all documents stand in rows of ``length`` laid end to end, document by document
    in the order of ``documents``."""
    starts = {}
    for row, own in enumerate(rows):
        place = row * length
        for number in own:
            starts[number] = place
            place += len(documents[number])
    found = [
        starts[number] + len(document.ids) + nth
        for number, document in enumerate(documents)
        for nth in range(len(document.branches))
    ]
    return torch.tensor(found, dtype=torch.long)


def require_packable(model: PreTrainedModel, name: str, longest: int, key: str) -> None:
    """Raise a UserError if packed documents would see each other in ``model``.

    Not all that transformers has goes by the mask that it is given: some models add a boolean one to their scores, some
    have layers with a state, some windows of their own. So it is tried out, with and without gradients.

    Args:
        model: on the CPU.
        name: what the recipe calls it.
        longest: tokens of the longest document.
        key: of the recipe.
    """
    if not attends_plainly(model, longest) or not _keeps_documents_apart(model):
        raise UserError(
            f"{key}: not every layer of {name} attends to all tokens before ({longest} at most), and alike: packed"
            " histories cannot be kept apart for it"
        )


def _keeps_documents_apart(model: PreTrainedModel) -> bool:
    """Whether two documents in a row, one of which branches, have the states that they have alone."""
    rng, before = np.random.default_rng(0), (model.training, model.config._attn_implementation)
    first, second = (rng.integers(model.config.get_text_config().vocab_size, size=size).tolist() for size in (7, 9))
    eos = second[-1]
    packed = pack([Document(first, [4]), Document(second)], [[0, 1]], eos)
    try:
        model.eval()
        with torch.no_grad():
            alone = [
                model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
                for ids in (first, [*first[:4], eos], second)
            ]
        expected = torch.cat([alone[0], alone[1][-1:], alone[2]])
        for with_gradients in (False, True):
            with torch.set_grad_enabled(with_gradients):
                found = hidden_states(model, packed)[0]
            if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
                return False
    except Exception as error:  # whatever a model makes of a mask that it does not know
        log.info("%s cannot read packed documents: %s", type(model).__name__, error)
        return False
    finally:
        model.train(before[0])
        _use(model, before[1])
    return True


def hidden_states(model: PreTrainedModel, packed: Packed, longest: int | None = None) -> Tensor:
    """[B, T, D] states of the last layer, each of them what its document alone would give.

    ``longest`` is the longest row of the whole forward pass, if it has several kinds of rows: activation checkpointing
    computes all of them again, and by one implementation of attention.
    """
    longest = packed.ids.shape[1] if longest is None else longest
    options: dict[str, object] = {"use_cache": False, "position_ids": packed.positions}
    device = packed.ids.device
    if device.type == "cuda" and packed.branches is None and _has_flash(model):
        options |= bounds(packed.bounds(), packed.ids.shape[1])
        _use(model, NAME)
    elif device.type == "cpu" and longest <= LONGEST_EAGER and torch.is_grad_enabled():
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else model.dtype
        hidden = ~packed.mask()
        mask = torch.zeros(hidden.shape, dtype=dtype)
        options["attention_mask"] = mask.masked_fill_(hidden, torch.finfo(dtype).min)
        _use(model, "eager")
    else:
        options["attention_mask"] = packed.mask()
        _use(model, "sdpa")
    return model.base_model(packed.ids, **options).last_hidden_state


def _use(model: PreTrainedModel, implementation: str) -> None:
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def _has_flash(model: PreTrainedModel) -> bool:
    """Whether flash attention takes what the model computes in."""
    config = model.config.get_text_config()
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return has_flash(torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype, head_size)
