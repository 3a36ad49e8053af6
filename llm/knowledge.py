"""Knowledge texts of every item of a catalog: ``knowledge.parquet``.

Runs as a process of its own (``python -m llm.knowledge``), so that the engine's memory is free again afterwards.

A text is a function of the model, the prompt and the settings alone: each has a key made of these, which is also its
seed. So a text that the file holds already is kept, items with one prompt share one text, and an interrupted run goes
on where it was and ends with the same file.
"""

import argparse
import contextlib
import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from llm.config import EngineConfig, LLMConfig
from llm.engine import ADAPTER, Engine, adapted
from llm.fingerprint import fingerprint
from llm.prompts import item_texts, prompt_tokens
from llm.tokenizer import load_tokenizer
from rec.data.prepared import Prepared
from rec.runtime import config, files
from rec.runtime.arrow_files import write_table
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.progress import progress
from rec.runtime.runfolder import try_lock

log = logging.getLogger(__name__)

WAVES_A_CALL = 4  # of as many texts as the engine writes at once; what is kept together, and what a kill can cost
WRITER_TIMEOUT_S = 6 * 3600.0  # whoever holds the file may be encoding a whole catalog


class Said(NamedTuple):
    """One text, and whether it was ``cut`` at the longest that it may be; None where an older file does not tell."""

    text: str
    cut: bool | None


class KnowledgeFile:
    """A ``knowledge.parquet`` and, while it is being made, the parts of it beside it.

    Columns: item_id, prompt, draw, text, cut, model, version, key; and ``vector`` once the texts are encoded. An item
    with several texts has as many rows, one after the other, ``draw`` counting them from 0.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = path.absolute().with_name(f"{path.name}.parts")

    def texts(self) -> dict[str, Said]:
        """The texts that there are, by key.

        Raises:
            UserError: if the file, or a part of it, is damaged.
        """
        found: dict[str, Said] = {}
        for path in [*sorted(self.parts.glob("part-*.parquet")), *([self.path] if self.path.exists() else [])]:
            try:
                told = "cut" in parquet.read_schema(path).names
                table = parquet.read_table(path, columns=["key", "text", *(["cut"] if told else [])])
            except (OSError, pa.ArrowException, KeyError) as error:
                raise UserError(f"{path} is damaged ({' '.join(str(error).split())[:200]}); delete it") from error
            cut = table["cut"].to_pylist() if told else [None] * len(table)
            said = map(Said, table["text"].to_pylist(), cut)
            found.update(zip(table["key"].to_pylist(), said, strict=True))
        return found

    def keep(self, keys: Sequence[str], texts: Sequence[Said], shard: int = 0) -> None:
        """Store finished texts until the file is whole; those of one ``shard`` are written by one process."""
        name = f"part-{shard:04d}"
        # After the highest: a damaged one in between may have been deleted.
        numbers = [int(path.stem.rpartition("-")[2]) for path in self.parts.glob(f"{name}-*.parquet")]
        number = max(numbers, default=-1) + 1
        table = pa.table(
            {"key": list(keys), "text": [said.text for said in texts], "cut": [said.cut for said in texts]}
        )
        write_table(self.parts / f"{name}-{number:06d}.parquet", table)

    @contextlib.contextmanager
    def sole_writer(self) -> Iterator[None]:
        """Wait for other processes to be done with looking whether the file is whole, or with encoding its texts.

        Raises:
            TimeoutError: if one of them never is.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.absolute().with_name(f".{self.path.name}.lock").open("a") as stream:
            begin = time.monotonic()
            while not try_lock(stream):
                if time.monotonic() - begin > WRITER_TIMEOUT_S:
                    raise TimeoutError(f"waited {WRITER_TIMEOUT_S:.0f} s for another process to finish {self.path}")
                time.sleep(0.05)
            yield

    def finish(self, table: pa.Table) -> None:
        """Write the whole file in place of an older one, and forget the parts."""
        write_table(self.path, table)
        shutil.rmtree(self.parts, ignore_errors=True)


def generate_knowledge(
    data: Prepared, model: str | Path, settings: LLMConfig, out: Path, version: str, shard: tuple[int, int] = (0, 1)
) -> None:
    """Write ``out``, rows in item order, generating what it does not hold yet with vLLM.

    Of ``shard`` (i, n) the i-th of n processes generates its part of the texts alone; the one that finds all of them
    there afterwards writes the file.

    Raises:
        UserError: if the model cannot be used, or ``out`` is damaged.
    """
    file, knowledge = KnowledgeFile(out), settings.knowledge
    tokenizer = load_tokenizer(model)
    prompts = prompt_tokens(item_texts(data.items, settings.item_text), knowledge.prompt, tokenizer)
    several = knowledge.texts
    prompts = [prompt for prompt in prompts for _ in range(several)]
    keys = text_keys(prompts, fingerprint(model), settings)
    with file.sole_writer():  # who may be taking the parts away, for they are in the file now
        texts = file.texts()
    different = dict(zip(keys, prompts, strict=True))
    own = list(different)[shard[0] :: shard[1]]
    missing = {key: different[key] for key in own if key not in texts}
    kept = len(own) - len(missing)
    if missing:
        longest = max(map(len, missing.values())) + knowledge.max_new_tokens
        engine = _engine(model, settings.engine, longest, knowledge.seed)
        wanted, at_once = list(missing), WAVES_A_CALL * settings.engine.max_num_seqs
        with progress("Knowledge", len(wanted)) as advance:
            for begin in range(0, len(wanted), at_once):
                part = wanted[begin : begin + at_once]
                found = engine.generate(
                    [missing[key] for key in part],
                    [int(key[:15], 16) for key in part],
                    knowledge.max_new_tokens,
                    knowledge.temperature,
                )
                said = [Said(completion.text.strip(), completion.cut) for completion in found]
                file.keep(part, said, shard[0])
                advance(begin + len(part))
    with file.sole_writer():
        texts = file.texts()
        if lacking := len(different.keys() - texts.keys()):
            log.info("%s: %d texts of this shard are there, %d of others are not yet", out, len(own), lacking)
            return
        _write(file, data, tokenizer.batch_decode(prompts), keys, texts, str(model), version)
    log.info(
        "%s: %d items, %d rows; %d texts written, %d kept, %d rows share one with another",
        out, data.n_items, len(keys), len(missing), kept, len(keys) - len(different),
    )  # fmt: skip
    counts = count_texts(out)
    if counts["empty"]:
        log.warning("%d of %d rows have an empty text; these are encoded as zeros", counts["empty"], len(keys))
    if counts["cut"]:
        log.warning(
            "%d of %d rows have a text that was cut: llm.knowledge.max_new_tokens is %d",
            counts["cut"], len(keys), knowledge.max_new_tokens,
        )  # fmt: skip


def _write(
    file: KnowledgeFile,
    data: Prepared,
    prompts: list[str],
    keys: list[str],
    texts: dict[str, Said],
    model: str,
    version: str,
) -> None:
    several = len(keys) // data.n_items
    table = {
        "item_id": [item for item in data.items["item_id"].to_pylist() for _ in range(several)],
        "prompt": prompts,
        "draw": [row % several for row in range(len(prompts))],
        "text": [texts[key].text for key in keys],
        "cut": pa.array([texts[key].cut for key in keys], pa.bool_()),
        "model": [model] * len(prompts),
        "version": [version] * len(prompts),
        "key": keys,
    }
    file.finish(pa.table(table))


def count_texts(path: Path) -> dict[str, int]:
    """How many rows a knowledge file has, how many texts that say nothing, and how many that were cut."""
    table = parquet.read_table(path)
    texts, cut = table["text"].to_pylist(), table["cut"].to_pylist() if "cut" in table.column_names else []
    return {"rows": len(texts), "empty": sum(not text for text in texts), "cut": sum(map(bool, cut))}


def first_texts(path: Path) -> list[str]:
    """The first text of every item in a knowledge file, in item order."""
    table = parquet.read_table(path, columns=["text", "draw"]).to_pydict()
    return [text for text, draw in zip(table["text"], table["draw"], strict=True) if draw == 0]


def _engine(model: str | Path, config: EngineConfig, longest: int, seed: int) -> Engine:
    """An engine of a whole model, or of an adapter and the model that it adapts."""
    if not (Path(model) / ADAPTER).exists():
        return Engine(model, config, longest, seed)
    engine = Engine(adapted(model), config, longest, seed, lora_rank=files.read_json(Path(model) / ADAPTER)["r"])
    engine.load_weights(Path(model), "adapted")
    return engine


def text_keys(prompts: Sequence[list[int]], model: str, llm: LLMConfig) -> list[str]:
    """A key for the text of every row's prompt: a hash of all that decides it, the number of the draw included."""
    settings = llm.knowledge
    decides = [model, llm.engine.dtype, settings.max_new_tokens, settings.temperature, settings.seed]
    common = hashlib.sha256(hash_of(decides).encode())
    keys = []
    for row, prompt in enumerate(prompts):
        own = common.copy()
        own.update(np.asarray([row % settings.texts, *prompt], dtype=np.int64).tobytes())
        keys.append(own.hexdigest()[:16])
    return keys


def shard_of(text: str) -> tuple[int, int]:
    """(i, n) of the argument "I/N".

    Raises:
        ValueError: if it is none with 0 <= i < n.
    """
    number, count = map(int, text.split("/"))
    if not 0 <= number < count:
        raise ValueError(text)
    return number, count


def main() -> None:
    """Entry of the generation process; its settings come from a YAML file with the ``llm`` section."""
    parser = argparse.ArgumentParser(prog="python -m llm.knowledge", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML with the keys of the llm section")
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--model", required=True, help="folder or hub name of the LLM")
    parser.add_argument("--version", default="initial", help="written beside every text")
    parser.add_argument("--out", type=Path, required=True, help="knowledge.parquet")
    parser.add_argument("--shard", type=shard_of, default=(0, 1), metavar="I/N", help="which of how many, from 0")
    arguments = parser.parse_args()
    settings = config.load(LLMConfig, arguments.config)
    data = Prepared.load(arguments.data)
    generate_knowledge(data, arguments.model, settings, arguments.out, arguments.version, arguments.shard)


if __name__ == "__main__":
    run_main(main)
