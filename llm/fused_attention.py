"""transformers' fused attention in the precision in which it is fast, under a name of its own."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rec.attention import better_in_float32

NAME = "recalign_fused"


def use_fused_attention(model: PreTrainedModel) -> None:
    """Let a model that would use torch's fused attention train faster on a CPU; others are left as they are."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def _attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    if not better_in_float32(q):
        return sdpa_attention_forward(module, q, k, v, attention_mask, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):
        found, none = sdpa_attention_forward(module, q.float(), k.float(), v.float(), attention_mask, **options)
    return found.to(q.dtype), none


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
