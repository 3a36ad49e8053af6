"""Items as key-value text, tokenised once: "title …, brand …, category …" (RECFORMER, 2.1).

A catalog's tokens are flat arrays in one file whose name is a hash of everything that decides them: the texts, the
tokenizer and the settings. Training reads these arrays and never a tokenizer.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from llm.recformer.config import TextConfig
from rec.data.prepared import Prepared
from rec.runtime import files
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.ranks import Ranks

log = logging.getLogger(__name__)

SCHEMA_VERSION = 3
UNSEEN = {"Cc", "Cf"}  # Unicode's control and format characters, which tokenizers leave out
CLS, KEY, VALUE, PADDING = range(4)  # the token types


@dataclass(frozen=True)
class ItemTokens:
    """The tokens of a catalog's items, one after the other; item number n (from 1) has ``offsets[n - 1 : n + 1]``.

    Attributes:
        ids: [T] int32 token ids.
        types: [T] int8, ``KEY`` or ``VALUE``.
        words: [T] int32 number of the word within the item, from 0; a word's tokens are neighbours.
        offsets: [N + 1] int64.
    """

    ids: np.ndarray
    types: np.ndarray
    words: np.ndarray
    offsets: np.ndarray

    @property
    def n_items(self) -> int:
        """Number of items."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[N] tokens of each item."""
        return np.diff(self.offsets)

    @classmethod
    def join(cls, catalogs: Sequence["ItemTokens"]) -> "ItemTokens":
        """Several catalogs as one: the items of each are numbered on after those before."""
        starts = np.cumsum([0, *(len(catalog.ids) for catalog in catalogs)])
        offsets = [catalog.offsets[:-1] + start for catalog, start in zip(catalogs, starts, strict=False)]
        flat = [np.concatenate([getattr(catalog, name) for catalog in catalogs]) for name in ("ids", "types", "words")]
        return cls(*flat, np.concatenate([*offsets, starts[-1:]]))


def item_tokens(
    data: Prepared, config: TextConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, ranks: Ranks | None = None
) -> ItemTokens:
    """The tokens of the data's items, from ``folder`` if it holds them; every rank calls this.

    Raises:
        UserError: if the catalog has none of the attributes, or an item has no text at all.
    """
    ranks = ranks or Ranks.current()
    columns = text_columns(data, config)

    def made() -> Path:
        path = folder / f"items-{_content_hash(data.items, columns, config, tokenizer)}.safetensors"
        if not _is_whole(path):
            tokens = tokenise(data.items, columns, config.attribute_tokens, tokenizer)
            folder.mkdir(parents=True, exist_ok=True)
            temporary = files.beside(path)
            save_file(vars(tokens), temporary)
            files.fsync(temporary)
            temporary.replace(path)
        return path

    return ItemTokens(**load_file(ranks.from_first(made)))


def tokenise(
    items: pa.Table, columns: Sequence[str], attribute_tokens: int, tokenizer: PreTrainedTokenizerBase
) -> ItemTokens:
    """Tokenise the columns of every item, key before value; an empty attribute is left out, its key too.

    Each attribute is cut after ``attribute_tokens`` tokens. An item without any text keeps the first key alone.
    """
    ids: list[list[int]] = [[] for _ in range(len(items))]
    types: list[list[int]] = [[] for _ in range(len(items))]
    words: list[list[int]] = [[] for _ in range(len(items))]
    cut = 0
    for column in columns:
        key = _encode(tokenizer, [column.replace("_", " ")])[0][0][:attribute_tokens]
        told = [row for row, text in enumerate(items[column].to_pylist()) if _is_text(text)]
        texts = [str(items[column][row]).strip() for row in told]
        room = attribute_tokens - len(key)
        for row, (value, own_words) in zip(told, _encode(tokenizer, texts), strict=True):
            if not value:
                continue
            cut += len(value) > room
            first = words[row][-1] + 1 if words[row] else 0
            ids[row] += [*key, *value[:room]]
            types[row] += [KEY] * len(key) + [VALUE] * len(value[:room])
            words[row] += [first] * len(key) + [first + 1 + word for word in own_words[:room]]
    if cut:
        log.info("%d attributes have more than %d tokens and are cut", cut, attribute_tokens)
    for row in range(len(items)):
        if not ids[row]:
            ids[row] = _encode(tokenizer, [columns[0].replace("_", " ")])[0][0]
            types[row], words[row] = [KEY] * len(ids[row]), [0] * len(ids[row])
    offsets = np.cumsum([0, *map(len, ids)])
    return ItemTokens(_flat(ids, np.int32), _flat(types, np.int8), _flat(words, np.int32), offsets.astype(np.int64))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Token ids and the number of each token's word, for every text."""
    if not texts:
        return []
    # With a space before it, so that a word inside an item has the tokens that it has inside a sentence.
    found = tokenizer([f" {text}" for text in texts], add_special_tokens=False, verbose=False)
    # A title that says "[MASK]" is not to be predicted.
    unknown = tokenizer.unk_token_id
    special = set(tokenizer.all_special_ids) if unknown is not None else set()
    plain = [[unknown if token in special else token for token in ids] for ids in found["input_ids"]]
    return [(ids, found.word_ids(row)) for row, ids in enumerate(plain)]


def _is_text(text: str | None) -> bool:
    """Whether anything of it can be seen."""
    return any(not (letter.isspace() or category(letter) in UNSEEN) for letter in text or "")


def _flat(rows: list[list[int]], kind: type) -> np.ndarray:
    return np.fromiter((value for row in rows for value in row), dtype=kind, count=sum(map(len, rows)))


def text_columns(data: Prepared, config: TextConfig) -> list[str]:
    """The attributes of the recipe that the catalog has.

    Raises:
        UserError: if it has none of them, or an item has no text at all.
    """
    columns = [name for name in config.attributes if name in data.items.column_names]
    if not columns:
        raise UserError(
            f"{data.folder} has none of llm.recformer.text.attributes ({', '.join(config.attributes)}); its items have:"
            f" {', '.join(data.items.column_names)}"
        )
    texts = [data.items[name].to_pylist() for name in columns]
    empty = [row for row, values in enumerate(zip(*texts, strict=True)) if not any(map(_is_text, values))]
    if empty and not config.allow_empty:
        raise UserError(
            f"{len(empty)} of {data.n_items} items of {data.folder} have no text in {', '.join(columns)}, e.g."
            f" {data.items['item_id'][empty[0]]}: name more columns in llm.recformer.text.attributes, or set"
            " llm.recformer.text.allow_empty=true"
        )
    return columns


def _content_hash(
    items: pa.Table, columns: Sequence[str], config: TextConfig, tokenizer: PreTrainedTokenizerBase
) -> str:
    texts = [[name, items[name].to_pylist()] for name in columns]  # in their order
    words = json.loads(tokenizer.backend_tokenizer.to_str())
    for limit in ("truncation", "padding"):  # which the first call takes off, for all that follow
        words.pop(limit)
    return hash_of([SCHEMA_VERSION, texts, config.attribute_tokens, words])


def _is_whole(path: Path) -> bool:
    try:
        return bool(load_file(path))
    except (OSError, SafetensorError):
        return False
