"""Item vectors of a causal LM: the hidden state of [EOS] after an item's text (LMRec, section 3.2)."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel

from llm.tokenizer import load_tokenizer, token_ids
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)

BATCH_TOKENS = 8192


@torch.no_grad()
def eos_vectors(model: str | Path, texts: Sequence[str], max_tokens: int = 512) -> Tensor:
    """[texts, K] float32, in the order of the texts; a longer text is cut, and [EOS] follows what is left.

    Raises:
        UserError: if it is no language model.
    """
    tokenizer = load_tokenizer(model)
    try:
        network = AutoModel.from_pretrained(str(model), dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"{model} is no language model: {str(error).strip().splitlines()[0]}") from error
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    room = min(max_tokens, getattr(network.config, "max_position_embeddings", max_tokens)) - 1
    rows = [[*ids[:room], tokenizer.eos_token_id] for ids in token_ids(tokenizer, texts)]
    cut = sum(len(row) > room for row in rows)
    if cut:
        log.info("%d of %d texts are cut to %d tokens", cut, len(rows), room)
    vectors = torch.empty(len(rows), network.config.hidden_size)
    order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
    while order:
        count = max(1, BATCH_TOKENS // len(rows[order[0]]))
        chosen, order = order[:count], order[count:]
        lengths = torch.tensor([len(rows[row]) for row in chosen])
        # Right padding under a causal mask is never seen.
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[row]) for row in chosen], batch_first=True)
        hidden = network(ids.to(network.device), use_cache=False).last_hidden_state
        vectors[chosen] = hidden[torch.arange(len(chosen)), lengths - 1].float().cpu()
    return vectors
