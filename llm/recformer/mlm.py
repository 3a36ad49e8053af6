"""Masked language modelling: which tokens are masked, and the head that predicts them."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM

from llm.recformer.batches import TokenSequences
from rec.linear_cross_entropy import linear_cross_entropy
from rec.runtime.packages import quiet

AS_MASK, AS_RANDOM = 0.8, 0.1  # the rest stays as it is
# Where a masked LM's head keeps (dense, LayerNorm, output bias).
HEADS = (
    ("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    ("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
)


def mask_tokens(
    sequences: TokenSequences,
    ratio: float,
    whole_words: bool,
    mask_token: int,
    vocabulary: int,
    rng: np.random.Generator,
) -> TokenSequences:
    """Choose tokens, all but [CLS] alike, by ``ratio``; 80 % become [MASK], 10 % a random token, 10 % stay.

    Args:
        sequences: not changed.
        ratio: share of tokens that are chosen and get a label.
        whole_words: choose words, all tokens of each; otherwise tokens.
        mask_token: id of [MASK].
        vocabulary: random tokens are below.
        rng: used up alike whatever is chosen.
    """
    eligible = sequences.words >= 0
    draws = rng.random(len(sequences.ids))
    if whole_words:
        # A word's first token draws for all of them; words of neighbours differ, so a change of number is a new word.
        begins = np.flatnonzero(np.diff(sequences.words, prepend=-2) != 0)
        draws = np.repeat(draws[begins], np.diff(begins, append=len(draws)))
    chosen = eligible & (draws < ratio)
    fate = rng.random(len(sequences.ids))
    random_ids = rng.integers(vocabulary, size=len(sequences.ids))
    ids = np.where(chosen & (fate < AS_MASK), mask_token, sequences.ids)
    ids = np.where(chosen & (fate >= AS_MASK) & (fate < AS_MASK + AS_RANDOM), random_ids, ids)
    return replace(sequences, ids=ids, labels=np.where(chosen, sequences.ids, -1))


class MaskedLMHead(nn.Module):
    """LN(GELU(W h + b)) scored against the word embeddings, plus a bias of each word."""

    def __init__(self, dim: int, embedding_dim: int, vocabulary: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(dim, embedding_dim), nn.LayerNorm(embedding_dim, eps)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        nn.init.normal_(self.dense.weight, std=0.02)
        nn.init.zeros_(self.dense.bias)

    def load_pretrained(self, name: str) -> bool:
        """Take the head of the masked LM ``name``; False, and nothing taken, if that has none."""
        try:
            with quiet():  # it has a page to say about a head that is not there
                model, info = AutoModelForMaskedLM.from_pretrained(name, output_loading_info=True, dtype=torch.float32)
        except (OSError, ValueError):
            return False
        weights, missing = model.state_dict(), set(info["missing_keys"])
        for dense, norm, bias in HEADS:
            own = {"dense": dense, "norm": norm}
            found = {f"{to}.{kind}": f"{at}.{kind}" for to, at in own.items() for kind in ("weight", "bias")}
            found["bias"] = bias
            if all(key in weights and key not in missing for key in found.values()):
                self.load_state_dict({to: weights[at] for to, at in found.items()})
                return True
        return False

    def forward(self, hidden: Tensor, words: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of ``labels`` [M] given hidden states [M, D] and word embeddings [V, E]."""
        states = self.norm(F.gelu(self.dense(hidden)))
        # The bias is one more entry of every word, which a state reads with 1; eight, so that rows stay aligned.
        states = F.pad(states, (0, 8))
        states = states + F.pad(states.new_ones(1, 1), (states.shape[1] - 8, 7))
        table = torch.cat([words, F.pad(self.bias[:, None], (0, 7))], dim=1)
        return linear_cross_entropy(states, table, labels)
