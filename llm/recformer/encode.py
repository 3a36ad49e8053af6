"""Vectors of a whole catalog: [CLS] of every item's text, sharded over ranks, in batches of like length.

``recalign vectors RUN|MODEL --data DIR --out FILE``, or
``accelerate launch --config_file launch/accelerate/cpu.yaml --num_processes 2 -m llm.recformer.encode
--model FOLDER --data DIR --out FILE``

Finished chunks lie beside the file until it is whole, so an interrupted run goes on where it was. A chunk does not
depend on the number of ranks.
"""

import argparse
import hashlib
import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer

from llm.fingerprint import fingerprint
from llm.recformer.batches import SequenceMaker
from llm.recformer.config import OptimizerConfig, RecformerSettings
from llm.recformer.model import RecformerModel, load_recformer, resolve
from llm.recformer.objective import Parts, encode
from llm.recformer.text import item_tokens
from rec.data.prepared import Prepared
from rec.items import save_vectors
from rec.precision import Precision, is_bf16
from rec.runtime import files
from rec.runtime.config import hash_of
from rec.runtime.logs import run_main
from rec.runtime.process_group import process_group
from rec.runtime.progress import progress
from rec.runtime.ranks import Ranks

CHUNK_ITEMS = 2048


def encode_items(model: RecformerModel, maker: SequenceMaker, parts: Parts) -> Tensor:
    """[N, D] float32 vectors of all items, on every rank; every rank calls this and encodes its share."""
    was_training, ranks = model.training, Ranks.current()
    model.eval()
    table = torch.zeros(maker.tokens.n_items, model.config.hidden_size, device=parts.device)
    with torch.no_grad():
        for items in by_length(maker)[ranks.rank :: ranks.size]:
            table[items] = encode(model, maker.single_items(items + 1), parts)
    if ranks.size > 1:
        torch.distributed.all_reduce(table)  # each row is zeros but on one rank
    model.train(was_training)
    return table


def by_length(maker: SequenceMaker, size: int = CHUNK_ITEMS // 8) -> list[np.ndarray]:
    """Items, counted from 0, in chunks of neighbours in length."""
    order = np.argsort(maker.tokens.lengths, kind="stable")
    return np.split(order, range(size, len(order), size))


def write_item_vectors(
    model: RecformerModel, maker: SequenceMaker, parts: Parts, data: Prepared, out: Path, source: dict[str, str]
) -> None:
    """Write ``out`` (``item_vectors.safetensors``); chunks that are there already are kept. Every rank calls this.

    Args:
        model: the encoder.
        maker: of the catalog's token sequences.
        parts: how they go through the encoder.
        data: the catalog.
        out: the file.
        source: where the vectors come from; goes into the file, and decides with the items which chunks are kept.
    """
    ranks, tokens = Ranks.current(), maker.tokens
    texts = [hashlib.sha256(values.tobytes()).hexdigest() for values in (tokens.ids, tokens.offsets, tokens.types)]
    plan = hash_of([source, texts, CHUNK_ITEMS, is_bf16(parts.stage.precision), data.meta["content_hash"]])
    folder = out.absolute().with_name(f"{out.name}.parts")
    own = folder / plan
    if ranks.is_first and not own.is_dir():
        shutil.rmtree(folder, ignore_errors=True)  # another model's, or another catalog's
        own.mkdir(parents=True)
    ranks.barrier()
    chunks = by_length(maker, CHUNK_ITEMS)
    paths = [own / f"chunk-{number:06d}.safetensors" for number in range(len(chunks))]
    model.eval()
    with progress("Vectors", len(chunks), ranks.is_first) as advance, torch.no_grad():
        for number in range(ranks.rank, len(chunks), ranks.size):
            path = paths[number]
            if not path.exists():
                vectors = encode(model, maker.single_items(chunks[number] + 1), parts).cpu()
                temporary = files.beside(path)
                save_file({"vectors": vectors, "items": torch.from_numpy(chunks[number])}, temporary)
                files.fsync(temporary)
                temporary.replace(path)
            advance(min(len(chunks), number + ranks.size))
    ranks.barrier()
    if ranks.is_first:
        table = torch.empty(tokens.n_items, model.config.hidden_size)
        for path in paths:  # and not what is seen there: a network folder may show another node's file late
            found = load_file(path)
            table[found["items"]] = found["vectors"]
        save_vectors(out, data.items["item_id"].to_pylist(), table, source)
        shutil.rmtree(folder)
    ranks.barrier()


def vectors_of_model(
    folder: Path, data: Prepared, out: Path, tokens: Path | None = None, precision: Precision = "fp32"
) -> None:
    """The vectors of a saved RECFORMER; every rank calls this.

    Args:
        folder: a model folder.
        data: the catalog.
        out: the file to make.
        tokens: where tokenised catalogs are kept; beside ``out`` by default.
        precision: of the encoder.
    """
    model = RecformerModel.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    write(
        model,
        tokenizer,
        data,
        out,
        {"model": str(folder), "kind": "RECFORMER", "weights": _weights(folder)},
        tokens,
        precision,
    )


def vectors_of_backbone(settings: RecformerSettings, data: Prepared, out: Path, tokens: Path | None = None) -> None:
    """The vectors of the untuned backbone as RECFORMER reads it ("LF" in the Elephant's tables)."""
    torch.manual_seed((settings.pretrain or OptimizerConfig()).seed)
    model, tokenizer = load_recformer(settings)
    described = settings.model_dump(mode="json", include={"backbone", "text", "size"})
    weights = fingerprint(resolve(settings.backbone))
    source = {"model": settings.backbone, "kind": "RECFORMER, untuned", "weights": weights}
    source["settings"] = hash_of(described)
    write(model, tokenizer, data, out, source, tokens)


def write(
    model: RecformerModel, tokenizer, data: Prepared, out: Path, source: dict[str, str], tokens: Path | None,
    precision: Precision = "fp32",
) -> None:  # fmt: skip
    """Tokenise and encode the catalog on the best device that there is."""
    if torch.cuda.is_available():
        model.to(torch.device("cuda", torch.cuda.current_device()))
    text, size = model.config.text_config(), model.config.size_config()
    folder = tokens or out.absolute().with_name("tokens")
    maker = SequenceMaker(item_tokens(data, text, tokenizer, folder), size, tokenizer.cls_token_id)
    parts = Parts(model, tokenizer.pad_token_id, OptimizerConfig(precision=precision))
    write_item_vectors(model, maker, parts, data, out, source)


def _weights(folder: Path) -> str:
    found = [[path.name, files.sha256_file(path)] for path in sorted(folder.glob("*.safetensors"))]
    return hash_of([found, files.read_json(folder / "config.json").get("size")])


def main() -> None:
    """Entry of every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a saved RECFORMER")
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument("--out", type=Path, required=True, help="item_vectors.safetensors to make")
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32")
    arguments = parser.parse_args()
    with process_group():
        vectors_of_model(arguments.model, Prepared.load(arguments.data), arguments.out, precision=arguments.precision)


if __name__ == "__main__":
    run_main(main, "vectors")
