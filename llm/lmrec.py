"""The LMRec architecture: a stock transformers decoder that vLLM loads as it is."""

from transformers import GPT2Config, GPT2LMHeadModel

from llm.config import LMRecConfig


def build_lmrec(config: LMRecConfig, vocabulary: int, eos: int) -> GPT2LMHeadModel:
    """An untrained decoder with tied embeddings, learned positions and a 2-matrix MLP (LMRec, Table 9)."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=config.context,
            n_embd=config.dim,
            n_layer=config.layers,
            n_head=config.heads,
            n_inner=config.ffn or 4 * config.dim,
            # The same function as GPT-2's "gelu_new" in one kernel instead of eight.
            activation_function="gelu_pytorch_tanh",
            # Dropout off: sampling, scoring and training must be the same distribution during alignment.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=eos,
            eos_token_id=eos,
            tie_word_embeddings=True,
        )
    )
