"""What a finished run recommends next, for one history or many."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rec.batches import fit_users
from rec.catalog import Catalog
from rec.data.prepared import Prepared
from rec.job import FinishedRun
from rec.models import MODELS
from rec.models.base import Recommender
from rec.runtime.errors import UserError


@dataclass(frozen=True)
class Recommendation:
    """One recommended item; scores compare within one list only."""

    rank: int
    number: int
    item_id: str
    title: str
    score: float


@dataclass(frozen=True)
class Request:
    """Whom to recommend for.

    Attributes:
        history: item numbers, oldest first.
        user: a user of the data; models that know users and not histories need it.
    """

    history: list[int]
    user: int | None = None


def request_for_user(data: Prepared, user: int) -> Request:
    """The whole known history of user number ``user``: what was trained on and what was held out."""
    return Request(data.sequence[data.offsets[user] : data.offsets[user + 1]].tolist(), user)


def recommend(
    run: FinishedRun, catalog: Catalog, requests: Sequence[Request], k: int = 10, include_seen: bool = False
) -> list[list[Recommendation]]:
    """The ``k`` best items for every request, or all there are.

    Args:
        run: the trained recommender.
        catalog: of ``run.data``.
        requests: at least one item each; scores of all of them are in memory at a time.
        k: length of the lists.
        include_seen: whether items of the history may be recommended.

    Raises:
        UserError: if ``k`` is below 1, a history is empty, the model needs a user and a request has none, or its
            scores are no numbers.
    """
    if k < 1:
        raise UserError(f"k is {k}; it must be at least 1")
    for request in requests:
        if not request.history:
            raise UserError("the history is empty: it needs at least one item")
        require_readable(run.model, request)
    if not requests:
        return []
    scores = _scores(run.model, requests)
    if not include_seen:
        for row, request in zip(scores, requests, strict=True):
            row[torch.tensor(request.history) - 1] = -torch.inf
    found = scores.topk(min(k, scores.shape[1]), dim=1)
    return [
        [
            Recommendation(rank, number + 1, catalog.ids[number], catalog.title(number + 1), score)
            for rank, (number, score) in enumerate(zip(numbers, values, strict=True), start=1)
            if score > -torch.inf
        ]
        for numbers, values in zip(found.indices.tolist(), found.values.tolist(), strict=True)
    ]


def require_readable(model: Recommender, request: Request) -> None:
    """Raise a UserError if ``model`` knows users alone and ``request`` has only a history."""
    if model.samples == "pairs" and request.user is None:
        readers = ", ".join(name for name, kind in MODELS.items() if kind.samples != "pairs")
        raise UserError(
            f"{model.architecture} knows the users that it was trained on and cannot read a history: name one with"
            f" --user (models that read any history: {readers})"
        )


def remarks(run: FinishedRun, request: Request, k: int, found: int) -> list[str]:
    """What a user should know about one answer of ``found`` items."""
    longest, length, lines = run.model.reach, len(request.history), []
    if run.model.samples == "pairs" and not fit_users(run.data, run.trained_on)[request.user]:
        lines.append(f"{run.model.architecture} was trained on nothing of this user: the list says nothing about them")
    if length > longest and run.model.samples != "pairs":
        lines.append(f"the history has {length:,} items, more than the model reads: only its last {longest} count")
    if found == 0:
        lines.append(f"nothing to recommend: the history holds all {run.data.n_items:,} items; try --include-seen")
    elif found < k:
        lines.append(f"{k:,} were asked for, only {found:,} can be recommended")
    return lines


@torch.no_grad()
def _scores(model: Recommender, requests: Sequence[Request]) -> Tensor:
    """[B, N] on the CPU."""
    device = next(model.parameters()).device
    windows = [torch.tensor(request.history[-model.config.max_length :]) for request in requests]
    users = torch.tensor([request.user or 0 for request in requests])
    lengths = torch.tensor([len(window) for window in windows])
    items = pad_sequence(windows, batch_first=True)
    scores = model.eval().score_all(users.to(device), items.to(device), lengths.to(device)).float().cpu()
    if scores.isnan().any():
        raise UserError(f"the scores of {model.architecture} are not numbers: it has diverged; train with a lower lr")
    return scores
