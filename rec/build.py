"""A recipe's recommender before its training: new, or with the weights of a finished run."""

from collections.abc import Callable
from typing import Any

import torch

from rec.batches import fit_ends
from rec.config import RecConfig, TrainConfig
from rec.data.prepared import Prepared
from rec.item_encoder import ItemEncoder
from rec.items import make_items
from rec.models import MODELS
from rec.models.base import Recommender
from rec.runtime import files
from rec.runtime.errors import UserError

MODEL, FINISHED = "model", "finished.json"  # what a finished training leaves in its run folder
# Options that change how a model is trained, not what its weights compute; max_length shows in shapes where it does.
TRAINING_ONLY = {
    "dropout", "item_dropout", "id_dropout", "mask_ratio", "last_only", "negatives", "l2", "trainable", "max_length",
}  # fmt: skip


def build_model(
    config: RecConfig, data: Prepared, make_encoder: Callable[[], ItemEncoder] | None = None
) -> Recommender:
    """An untrained recommender with the item encoder that ``make_encoder`` makes, by default ``config.items``.

    Its weights are a function of ``config.train.seed``, or those of the run that ``config.train.start`` names.

    Raises:
        UserError: if that run is none, or another kind of model, or nothing is left to train.
    """
    torch.manual_seed(config.train.seed)
    items = make_encoder() if make_encoder else make_items(config.items, data, config.model.dim)
    model = MODELS[config.model.name].for_data(config.model, items, data, fit_ends(data, config.train.on))
    if config.train.start is not None:
        _take_weights(model, config.train, data)
    for name, parameter in model.named_parameters():
        if config.train.tune != "all" and name.startswith("items.") != (config.train.tune == "items"):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"rec.train.tune={config.train.tune} leaves nothing to train: the items' vectors are frozen")
    return model


def same_data(finished: dict[str, Any], data: Prepared) -> bool:
    """Whether what ``finished.json`` says is of a training on the very content of ``data``."""
    now = data.meta["content_hash"]
    return finished.get("data_hash", now) == now


def _take_weights(model: Recommender, train: TrainConfig, data: Prepared) -> None:
    """Load the weights of the finished run ``train.start``, which may have kept its items' vectors frozen."""
    start, here = train.start, f"rec.train.start: {train.start}"
    if not (start / FINISHED).is_file():
        raise UserError(f"{here} holds no finished recommender (no {FINISHED})")
    facts = files.read_json(start / FINISHED)
    if not same_data(facts, data):
        raise UserError(f"{here} was trained on other data than {data.folder} holds")
    if facts.get("trained_on", "train") != "train" and train.on == "train":
        raise UserError(f"{here} was trained on the validation items, which are to stop by: set train.on=train+valid")
    before = Recommender.from_pretrained(start / MODEL)
    own, other = _function(model), _function(before)
    if different := [key for key in own if own[key] != other.get(key)]:
        key = different[0]
        raise UserError(f"{here} is another kind of model or items: its {key} is {other.get(key)!r}, not {own[key]!r}")
    state = before.state_dict()
    for name, value in model.named_buffers():
        if name in state and not torch.equal(value, state[name]):
            raise UserError(f"{here} has other {name} than this recipe gives it: nothing would read this recipe's")
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{here} is another kind of model or items: {' '.join(str(error).split())[:300]}") from None


def _function(model: Recommender) -> dict[str, Any]:
    """Everything that decides what a model of some weights computes."""
    settings = {**model.config.model_dump(mode="json"), **model.items.settings(), "items": model.items.kind}
    own = {key: value for key, value in settings.items() if key not in TRAINING_ONLY}
    return {"architecture": model.architecture, **own}
