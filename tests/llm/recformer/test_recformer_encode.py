"""The encoding of catalogs: in chunks that are kept, and by several ranks."""

import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_recformer import RECFORMER, popen

from llm.recformer import encode as encoding
from llm.recformer.batches import SequenceMaker
from llm.recformer.config import OptimizerConfig, RecformerSettings
from llm.recformer.encode import encode_items, vectors_of_model
from llm.recformer.model import load_recformer
from llm.recformer.objective import Parts
from llm.recformer.text import item_tokens
from rec.data.prepared import Prepared
from rec.runtime.config import build

ITEMS = 8  # of a chunk: the catalog's 30 are four

# The command with smaller chunks, which leaves how many it encoded in a file of its rank's.
COUNTING = f"""
import os
from llm.recformer import encode

calls, original = [], encode.encode
encode.CHUNK_ITEMS = {ITEMS}
encode.encode = lambda *inputs: (calls.append(1), original(*inputs))[1]
encode.main()
with open(f"{{__file__}}.{{os.environ.get('RANK', 0)}}-of-{{os.environ.get('WORLD_SIZE', 1)}}", "w") as file:
    file.write(str(len(calls)))
"""


class Encoded(NamedTuple):
    """A model folder, and its vectors of the catalog by one call for all of it."""

    model: Path
    vectors: torch.Tensor


@pytest.fixture(scope="module")
def encoded(bert: Path, small_data: Prepared, tmp_path_factory) -> Encoded:
    settings = build(RecformerSettings, {**RECFORMER, "backbone": str(bert)})
    model, tokenizer = load_recformer(settings)
    folder = tmp_path_factory.mktemp("encoded")
    for own in (model, tokenizer):
        own.save_pretrained(folder / "model")
    tokens = item_tokens(small_data, settings.text, tokenizer, folder / "tokens")
    maker = SequenceMaker(tokens, settings.size, tokenizer.cls_token_id)
    parts = Parts(model, tokenizer.pad_token_id, OptimizerConfig(precision="fp32"))
    return Encoded(folder / "model", encode_items(model, maker, parts))


def test_a_catalog_is_encoded_in_chunks_that_are_kept(encoded, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "CHUNK_ITEMS", ITEMS)
    out, original, calls = tmp_path / "vectors" / "item_vectors.safetensors", encoding.encode, []

    def killed_after_two(*inputs):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return original(*inputs)

    monkeypatch.setattr(encoding, "encode", killed_after_two)
    with pytest.raises(KeyboardInterrupt):
        vectors_of_model(encoded.model, small_data, out)
    assert not out.exists()

    monkeypatch.setattr(encoding, "encode", lambda *inputs: (calls.append(1), original(*inputs))[1])
    elsewhere = tmp_path / "interrupted"
    shutil.copytree(out.parent, elsewhere)
    vectors_of_model(encoded.model, small_data, out)
    assert len(calls) == 4

    other = tmp_path / "other"  # a model of other weights takes none of its chunks
    shutil.copytree(encoded.model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value * 1.5 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    vectors_of_model(other, small_data, elsewhere / out.name)
    assert len(calls) == 8
    torch.testing.assert_close(load_file(out)["vectors"], encoded.vectors, rtol=1e-4, atol=1e-5)
    assert not out.with_name(f"{out.name}.parts").exists()


@pytest.mark.distributed
def test_two_ranks_encode_their_shares_and_write_the_bits_that_one_does(encoded, small_data, tmp_path):
    script = tmp_path / "encode.py"
    script.write_text(COUNTING)
    launch = ["-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "0"]
    for name, how in (("one", []), ("two", launch)):
        out = tmp_path / name / "item_vectors.safetensors"
        told = ["--model", encoded.model, "--data", small_data.folder, "--out", out]
        log = tmp_path / f"{name}.log"
        code = popen([sys.executable, *how, *map(str, [script, *told])], log).wait(400)
        assert code == 0, log.read_text()[-4000:]
    counts = {path.suffix: path.read_text() for path in tmp_path.glob("encode.py.*")}
    assert counts == {".0-of-1": "4", ".0-of-2": "2", ".1-of-2": "2"}
    one, two = (load_file(tmp_path / name / "item_vectors.safetensors")["vectors"] for name in ("one", "two"))
    assert torch.equal(one, two)
    torch.testing.assert_close(two, encoded.vectors, rtol=1e-4, atol=1e-5)
