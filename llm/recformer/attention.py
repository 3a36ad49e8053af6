"""What [CLS] attends to in every layer and head (Elephant, 3.2), and numbers for what the paper reads off the maps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from llm.recformer.batches import SequenceMaker, TokenBatch, pad
from llm.recformer.model import RecformerModel

STRATA = 3  # layers 0-3, 4-7 and 8-11 of twelve


@dataclass(frozen=True)
class AttentionMap:
    """The attention of one history's tokens.

    Attributes:
        cls: [layers, heads, T] how much [CLS] attends to every token; sums to 1.
        full: [layers, heads, T, T] the same of every token; None for a Longformer, whose other tokens see a window.
        items: [T] position of each token's item, 0 for [CLS].
        ids: [T] tokens.
    """

    cls: Tensor
    full: Tensor | None
    items: np.ndarray
    ids: np.ndarray

    @property
    def first_tokens(self) -> np.ndarray:
        """[items] where each item begins."""
        return np.flatnonzero(np.diff(self.items) > 0) + 1


@torch.no_grad()
def attention_map(model: RecformerModel, maker: SequenceMaker, history: np.ndarray, pad_token: int) -> AttentionMap:
    """The attention of a model on one history of item numbers, newest last."""
    before = model.backbone.config._attn_implementation
    # Fused attention does not keep its weights. A Longformer has one implementation, and knows no other name.
    if not model.is_longformer:
        model.backbone.set_attn_implementation("eager")
    was_training = model.training
    sequences = maker([history])
    length = int(sequences.lengths[0])
    batch: TokenBatch = pad(sequences, np.array([0]), pad_token, model.length_multiple)
    out = model.eval()(batch.to(next(model.parameters()).device), output_attentions=True)
    if model.is_longformer:
        # [B, heads, T, global tokens]: the weights of the one global token, [CLS].
        cls, full = torch.stack([layer[0, :, :length, 0] for layer in out.global_attentions]), None
    else:
        full = torch.stack([layer[0, :, :length, :length] for layer in out.attentions]).cpu()
        cls = full[:, :, 0]
        model.backbone.set_attn_implementation(before)
    model.train(was_training)
    return AttentionMap(cls.float().cpu(), full, sequences.items, sequences.ids)


def layer_similarity(maps: Sequence[AttentionMap]) -> Tensor:
    """[layers, layers] cosine of what [CLS] attends to beside itself, heads averaged, mean over histories."""
    found = []
    for own in maps:
        profiles = F.normalize(own.cls[:, :, 1:].mean(1), dim=-1)
        found.append(profiles @ profiles.T)
    return torch.stack(found).mean(0)


def stratification(similarity: Tensor) -> float | None:
    """How much more alike neighbours of one third of the layers are than neighbours across its border.

    Neighbours alone: layers of one third are also nearer to each other than to the others, and nearness by itself makes
    layers alike. 0 where nothing sets the thirds apart, at most 1; None where a third is one layer.
    """
    layers = len(similarity)
    inside, across = [], []
    borders = {own[-1] for own in np.array_split(range(layers), STRATA)}
    for layer in range(layers - 1):
        (across if layer in borders else inside).append(similarity[layer, layer + 1].item())
    if not inside or not across:
        return None
    return round(float(np.mean(inside) - np.mean(across)), 4)


def figures(maps: Sequence[AttentionMap]) -> dict[str, object]:
    """Numbers for section 3.2's findings, means over histories.

    ``layer_similarity`` [layers][layers] and ``stratification`` (finding 1); ``first_token_share`` [layers], of [CLS]'s
    attention to items' tokens what falls on each item's first, beside ``first_token_even``, what an even spread would
    give, and ``inside_item`` [layers], how much the first tokens attend to their own item's tokens (2);
    ``newest_item_share`` [layers] beside ``newest_item_even`` (3); ``head_similarity`` [layers], the mean cosine
    between two heads (4).
    """
    similarity = layer_similarity(maps)
    inside = [_inside_item(own) for own in maps if own.full is not None]
    return {
        "histories": len(maps),
        "layer_similarity": _rounded(similarity),
        "stratification": stratification(similarity),
        "first_token_share": _rounded(torch.stack([_share(own, _is_first(own)) for own in maps]).mean(0)),
        "first_token_even": round(float(np.mean([_is_first(own)[1:].mean() for own in maps])), 4),
        "inside_item": _rounded(torch.stack(inside).mean(0)) if inside else None,
        "newest_item_share": _rounded(torch.stack([_share(own, own.items == 1) for own in maps]).mean(0)),
        "newest_item_even": round(float(np.mean([(own.items[1:] == 1).mean() for own in maps])), 4),
        "head_similarity": _rounded(torch.stack([_head_similarity(own) for own in maps]).mean(0)),
    }


def _is_first(own: AttentionMap) -> np.ndarray:
    marks = np.zeros(len(own.items), dtype=bool)
    marks[own.first_tokens] = True
    return marks


def _share(own: AttentionMap, marks: np.ndarray) -> Tensor:
    """[layers] of [CLS]'s attention to items' tokens the share on the marked ones, heads averaged."""
    profile = own.cls.mean(1)
    return profile[:, torch.from_numpy(marks)].sum(1) / profile[:, 1:].sum(1)


def _inside_item(own: AttentionMap) -> Tensor:
    """[layers] how much items' first tokens attend to tokens of their own item."""
    first = torch.from_numpy(own.first_tokens)
    items = torch.from_numpy(own.items)
    same = items[first][:, None] == items[None, :]
    return (own.full[:, :, first] * same).sum(-1).mean((1, 2))


def _head_similarity(own: AttentionMap) -> Tensor:
    """[layers] mean cosine between what two heads of a layer attend to from [CLS], beside [CLS] itself."""
    heads = F.normalize(own.cls[:, :, 1:], dim=-1)
    count = heads.shape[1]
    total = (heads @ heads.transpose(1, 2)).sum((1, 2)) - count
    return total / max(1, count * (count - 1))


def _rounded(values: Tensor) -> list:
    return torch.round(values.double(), decimals=4).tolist()
