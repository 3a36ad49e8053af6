"""Byte-level BPE trained on the item texts, as LMRec's, and the safe way to load anyone's tokenizer."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rec.runtime.errors import UserError

ARROW, EOS, PAD = "→", "<|eos|>", "<|pad|>"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def train_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with at most ``vocabulary`` tokens.

    The arrow between items is one token that takes the space before it along, so that an item's tokens do not
    depend on its neighbours.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    arrow = AddedToken(ARROW, lstrip=True, normalized=False)
    # Each item occurs at the head of a text and, with a space, after an arrow.
    both = (form for text in texts for form in (text, f" {text}"))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - 1,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(both, trainer)
    tokenizer.add_tokens([arrow])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, bos_token=EOS, pad_token=PAD, model_max_length=context
    )


def load_tokenizer(model: str | Path, has_end: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Args:
        model: folder or hub name.
        has_end: whether an end-of-sequence token is needed; encoders have none.

    Raises:
        UserError: if there is none, or it has no end-of-sequence token.
    """
    # From a model's folder alone transformers makes up a tokenizer without a vocabulary, and says nothing.
    if Path(model).is_dir() and not any((Path(model) / name).exists() for name in VOCABULARY_FILES):
        raise UserError(f"{model} has no usable tokenizer: none of {', '.join(VOCABULARY_FILES)} is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model))
    except (OSError, ValueError, KeyError, TypeError) as error:
        first, place = str(error).strip().splitlines()[0], "" if Path(model).exists() else ", which is no folder here,"
        raise UserError(f"{model}{place} has no usable tokenizer: {first}") from error
    if has_end and tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {model} has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """Token ids of texts of any length: whoever asks cuts them or refuses them, so that transformers need not warn.

    Args:
        tokenizer: of the texts.
        texts: any number of them.
        special: with the tokens that the tokenizer puts around a text.
    """
    return tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"] if texts else []
