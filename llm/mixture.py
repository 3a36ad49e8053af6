"""Task-specific and task-agnostic documents, mixed as a recipe says (LMRec, section 2.2 and Table 5)."""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from llm.corpus import HistoryCorpus
from llm.lmrec_job import CorpusConfig, SourceConfig
from llm.prompts import item_texts
from llm.tokenizer import token_ids
from rec.data.prepared import Prepared
from rec.data.readers.table import read_items
from rec.runtime.errors import UserError


@dataclass(frozen=True)
class TaskData:
    """The data of one recommendation task, and the texts of its items."""

    data: Prepared
    texts: list[str]


class Source:
    """One task-agnostic source, opened.

    Args:
        config: what and where it is.

    Raises:
        UserError: if it is not there, or not what the recipe says.
    """

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self.prepared: Prepared | None = None
        if config.data is not None:
            self.prepared = Prepared.load(Path(config.data))
            self.texts = item_texts(self.prepared.items, config.item_text)
        elif config.items is not None:
            self.texts = item_texts(_filled(read_items(config.items)), config.item_text)
        else:
            self.texts = paragraphs(config.text)

    def documents(self, tokenizer: PreTrainedTokenizerBase, context: int, seed: int) -> list[list[int]]:
        """Token ids of its documents, each at most ``context`` long and ended by [EOS] where it does end."""
        if self.prepared is not None:
            return histories(TaskData(self.prepared, self.texts), tokenizer, context, seed)
        found, eos = [], tokenizer.eos_token_id
        for ids in token_ids(tokenizer, self.texts):
            whole = [*ids, eos]
            found += [whole[begin : begin + context] for begin in range(0, len(whole), context)]
        return [ids for ids in found if len(ids) > 1]


def histories(task: TaskData, tokenizer: PreTrainedTokenizerBase, context: int, seed: int) -> list[list[int]]:
    """The training histories of a task as documents of at most ``context`` tokens."""
    corpus = HistoryCorpus(task.data, task.texts, tokenizer, context)
    return [row.ids for row in corpus.rows(seed, 0)]


def mix(
    tasks: Sequence[TaskData],
    sources: Sequence[Source],
    config: CorpusConfig,
    tokenizer: PreTrainedTokenizerBase,
    context: int,
    seed: int,
) -> list[list[int]]:
    """The documents that are language modelled.

    A share is counted in tokens: of 0.7 specific and 0.3 agnostic together come as many tokens as the whole
    task-specific corpus has, as in Table 5.

    Raises:
        UserError: if a source has fewer tokens than its share asks for, or nothing is left to model.
    """
    specific = [ids for task in tasks for ids in histories(task, tokenizer, context, seed)]
    whole = sum(map(len, specific))
    found = _some(specific, config.specific * whole, seed) if config.specific < 1 else specific
    for number, source in enumerate(sources, start=1):
        documents = source.documents(tokenizer, context, seed)
        if source.config.share is not None:
            wanted = source.config.share * whole
            if (known := sum(map(len, documents))) < wanted:
                raise UserError(
                    f"llm.corpus.agnostic: source {number} has {known:,} tokens, its share of {source.config.share:g}"
                    f" asks for {wanted:,.0f}: lower it, or leave it out to read all there are"
                )
            documents = _some(documents, wanted, seed + number)
        found = found + documents
    if not found:
        raise UserError("the corpus is empty: llm.corpus leaves nothing to model")
    return found


def paragraphs(path: Path) -> list[str]:
    """The paragraphs of a text file, or of all text files of a folder.

    Raises:
        UserError: if there is none, or a file cannot be read.
    """
    files = [path] if path.is_file() else sorted([*path.glob("*.txt"), *path.glob("*.txt.gz")])
    found = []
    for file in files:
        try:
            raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"llm.corpus: {file} cannot be read: {error}") from error
        blocks = raw.decode("utf-8", errors="replace").split("\n\n")
        found += [" ".join(block.split()) for block in blocks if block.strip()]
    if not found:
        raise UserError(f"llm.corpus: {path} holds no text (.txt, .txt.gz)")
    return found


def _filled(items: pa.Table) -> pa.Table:
    """Every column as text, missing values empty."""
    columns = {
        name: [value or "" for value in items[name].cast(pa.string()).to_pylist()] for name in items.column_names
    }
    return pa.table(columns)


def _some(documents: list[list[int]], tokens: float, seed: int) -> list[list[int]]:
    """Random documents with about ``tokens`` tokens."""
    order = np.random.default_rng([seed, 4]).permutation(len(documents))
    sums = np.cumsum([len(documents[number]) for number in order])
    return [documents[number] for number in np.sort(order[: int(np.searchsorted(sums, tokens))])]
