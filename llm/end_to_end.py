"""Texts laid end to end in one row: no padding, so every linear layer computes on tokens alone.

Attention stays within each text: on a GPU by torch's variable-length flash attention, elsewhere by plain products over
texts that are padded for this one step, which at these lengths is cheap. Models get it through transformers' attention
interface, and the texts' bounds under the names that transformers itself uses for such rows.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

NAME = "recalign_end_to_end"


@dataclass(frozen=True)
class EndToEnd:
    """M texts in one row.

    Attributes:
        ids: [1, T] tokens.
        positions: [1, T] place within the text.
        bounds: [M + 1] int32 where texts begin, and T.
        longest: tokens of the longest text.
    """

    ids: Tensor
    positions: Tensor
    bounds: Tensor
    longest: int

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> "EndToEnd":
        """Lay out ``texts``, none of them empty."""
        lengths = torch.tensor([len(text) for text in texts])
        bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        positions = torch.arange(int(bounds[-1])) - bounds[:-1].repeat_interleave(lengths)
        ids = torch.tensor([token for text in texts for token in text])
        return cls(ids[None].to(device), positions[None].to(device), bounds.int().to(device), int(lengths.max()))


def use_end_to_end(model: PreTrainedModel) -> bool:
    """Have ``model`` read such rows; False if it cannot, and nothing is changed.

    It can if its attention goes through the interface and is the plain causal one in every layer.
    """
    if not model._supports_attention_backend or not attends_plainly(model):
        return False
    model.set_attn_implementation(NAME)
    return True


def attends_plainly(model: PreTrainedModel, longest: int | None = None) -> bool:
    """Whether every layer attends to all that comes before, without a cap.

    Args:
        model: any causal LM.
        longest: tokens of the longest text that it will read: a sliding window as long is none.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window and (longest is None or window < longest):
        return False
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return layers <= {"full_attention", "sliding_attention"} and not getattr(config, "attn_logit_softcapping", None)


def bounds(begins: Tensor, longest: int) -> dict[str, Tensor | int]:
    """Keyword arguments for a model that ``use_end_to_end``: where texts begin, and the most tokens that one has."""
    return {"cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest}


def logits_at(model: nn.Module, texts: EndToEnd, places: Tensor, end_to_end: bool = True) -> Tensor:
    """[P, V] float32 logits of the tokens after the ``places`` [P] in the row.

    Args:
        model: a causal LM, or an engine around one.
        texts: what it reads.
        places: ascending.
        end_to_end: whether ``use_end_to_end`` said so; otherwise texts are right-padded to rows of their own.
    """
    if end_to_end:
        options = {"position_ids": texts.positions, **bounds(texts.bounds, texts.longest)}
        return model(input_ids=texts.ids, use_cache=False, logits_to_keep=places, **options).logits[0].float()
    rows = torch.split(texts.ids[0], texts.bounds.diff().tolist())
    ids = nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    if not len(places):
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[:0, 0].float()
    row, place = torch.searchsorted(texts.bounds, places, right=True) - 1, texts.positions[0][places]
    # A causal model needs no mask for padding on the right; the same stretch of places is computed in all rows.
    stretch = torch.arange(int(place.min()), int(place.max()) + 1, device=ids.device)
    return model(input_ids=ids, use_cache=False, logits_to_keep=stretch).logits[row, place - stretch[0]].float()


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: object,
) -> tuple[Tensor, None]:
    """[B, T, H, D] from query, key and value [B, H, T, D], of which key and value may have fewer heads.

    Texts are within the bounds ``cu_seq_lens_q`` of the B rows laid end to end; none is longer than ``max_length_q``.
    """
    assert dropout == 0, "sampling, scoring and training must be the same distribution"
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    flat = [part.transpose(1, 2).flatten(0, 1).contiguous() for part in (query, key, value)]
    if query.is_cuda and has_flash(query.dtype, query.shape[-1]):
        sizes = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
        found = _VARLEN(*flat, *sizes, scale=scaling, window_size=(-1, 0))  # causal: all before, nothing after
    else:
        found = _padded(*flat, cu_seq_lens_q, max_length_q, scaling)
    return found.unflatten(0, (query.shape[0], query.shape[2])), None


def has_flash(dtype: torch.dtype, head_size: int) -> bool:
    """Whether torch's variable-length flash attention is there, on this GPU, in ``dtype``, for heads of this width."""
    fits = dtype in (torch.bfloat16, torch.float16) and head_size % 8 == 0 and head_size <= 256
    return fits and _VARLEN is not None and torch.cuda.get_device_capability() >= (8, 0)


def _padded(query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scaling: float) -> Tensor:
    """The same of [T, H, D] by plain products: the CPU's fused attention is slow backwards."""
    step = torch.arange(longest, device=query.device)
    inside = step < bounds.diff()[:, None]
    index = (bounds[:-1, None] + step).clamp(max=len(query) - 1)
    query, key, value = (part[index].transpose(1, 2) for part in (query, key, value))
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores.masked_fill(step > step[:, None], torch.finfo(scores.dtype).min)
    shares = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    return (shares @ value).transpose(1, 2)[inside]


def _find_varlen():
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "scale"} <= set(known) else None


_VARLEN = _find_varlen()
AttentionInterface.register(NAME, attention)
