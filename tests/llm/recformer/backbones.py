"""Tiny untrained encoders with tokenizers of their own, in folders, as a user's backbone is."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertConfig, BertForMaskedLM, LongformerConfig, LongformerModel, PreTrainedTokenizerFast

WORDS = [f"Thing number {number}" for number in range(40)] + ["title kind brand odd even category of a toy"]
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]"]
    tokenizer.train_from_iterator(WORDS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=special))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", **names)


def save_bert(folder: Path, positions: int = 64, dropout: float = 0.0) -> Path:
    """A BERT with a masked-LM head."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=positions, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout, pad_token_id=0, initializer_range=0.2, **SIZE,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_longformer(folder: Path, positions: int = 130) -> Path:
    """A Longformer whose positions count from 2, as RoBERTa's do."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LongformerConfig(
        vocab_size=len(tokenizer), max_position_embeddings=positions, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=1, attention_window=8, type_vocab_size=1,
        initializer_range=0.2, **SIZE,
    )  # fmt: skip
    LongformerModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
