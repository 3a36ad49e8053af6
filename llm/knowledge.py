"""One knowledge text an item, for a whole catalog: ``knowledge.parquet``.

Runs as a process of its own (``python -m llm.knowledge``), so that the engine's memory is free again afterwards.
"""

import argparse
import logging
from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from llm.config import LLMConfig
from llm.engine import Completion, Engine
from llm.prompts import item_texts, prompt_tokens
from llm.tokenizer import load_tokenizer
from rec.data.prepared import Prepared
from rec.runtime import config, files
from rec.runtime.logs import run_main
from rec.runtime.progress import progress

log = logging.getLogger(__name__)

PROMPTS_A_CALL = 2048


def generate_knowledge(data: Prepared, model: str | Path, settings: LLMConfig, out: Path, version: str) -> None:
    """Generate with vLLM and write item_id, prompt, text, model, version; atomically, rows in item order."""
    knowledge = settings.knowledge
    texts = item_texts(data.items, settings.item_text)
    tokenizer = load_tokenizer(model)
    prompts = prompt_tokens(texts, knowledge.prompt, tokenizer)
    engine = Engine(model, settings.engine, max(map(len, prompts)) + knowledge.max_new_tokens, knowledge.seed)
    completions: list[Completion] = []
    with progress("Knowledge", len(prompts)) as advance:
        for begin in range(0, len(prompts), PROMPTS_A_CALL):
            part = prompts[begin : begin + PROMPTS_A_CALL]
            seeds = [knowledge.seed * 1_000_003 + begin + place for place in range(len(part))]
            completions += engine.generate(part, seeds, knowledge.max_new_tokens, knowledge.temperature)
            advance(len(completions))
    table = pa.table(
        {
            "item_id": data.items["item_id"],
            "prompt": tokenizer.batch_decode(prompts),
            "text": [completion.text.strip() for completion in completions],
            "model": [str(model)] * len(prompts),
            "version": [version] * len(prompts),
        }
    )
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    files.write_bytes(out, sink.getvalue().to_pybytes())
    empty = sum(not completion.text.strip() for completion in completions)
    if empty:
        log.warning("%d of %d knowledge texts are empty; they are encoded as zeros", empty, len(completions))


def main() -> None:
    """Entry of the generation process; its settings come from a YAML file with the ``llm`` section."""
    parser = argparse.ArgumentParser(prog="python -m llm.knowledge", description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML with the keys of the llm section")
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--model", required=True, help="folder or hub name of the LLM")
    parser.add_argument("--version", default="initial", help="written beside every text")
    parser.add_argument("--out", type=Path, required=True, help="knowledge.parquet")
    arguments = parser.parse_args()
    settings = config.load(LLMConfig, arguments.config)
    data = Prepared.load(arguments.data)
    generate_knowledge(data, arguments.model, settings, arguments.out, arguments.version)


if __name__ == "__main__":
    run_main(main)
