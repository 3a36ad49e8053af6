"""``recalign vectors`` from a causal LM and a sentence encoder, and from what has none."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, safe_open
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "llm" / "recformer"))
from backbones import save_bert
from tiny_recformer import RECFORMER

from launch import cli, vectors
from llm.config import LMRecConfig
from llm.lmrec import build_lmrec
from llm.recformer.job import RecformerJob
from llm.tokenizer import train_tokenizer
from rec.job import load_job
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder
from rec.train import run as train


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert") / "model")


def test_vectors_of_a_causal_lm_are_the_states_of_eos(small_data, tmp_path):
    torch.manual_seed(0)
    texts = [f"{row['title']}, {row['kind']}" for row in small_data.items.to_pylist()]
    tokenizer = train_tokenizer(texts, 400, 48)
    model = build_lmrec(LMRecConfig(dim=32, heads=2, layers=1, context=48), len(tokenizer), tokenizer.eos_token_id)
    model.save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    out = tmp_path / "vectors.safetensors"
    vectors.write(str(tmp_path / "lm"), small_data.folder, out, item_text="{title}, {kind}")
    found = load_file(out)["vectors"]
    for row in (0, 13, 29):
        ids = torch.tensor([[*tokenizer(texts[row])["input_ids"], tokenizer.eos_token_id]])
        expected = model.eval().transformer(ids).last_hidden_state[0, -1]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)
    with safe_open(out, framework="pt") as stored:
        assert "[EOS]" in json.loads(stored.metadata()["source"])["kind"]
        assert json.loads(stored.metadata()["item_ids"]) == small_data.items["item_id"].to_pylist()


def test_vectors_of_a_sentence_encoder_are_means_and_go_into_a_recommender(
    backbone, small_data, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "sentence.safetensors"
    command = ["recalign", "vectors", str(backbone), "--data", str(small_data.folder), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    cli.main()
    assert "30 items, width 32" in capsys.readouterr().out
    found = load_file(out)["vectors"]
    tokenizer, model = AutoTokenizer.from_pretrained(backbone), AutoModel.from_pretrained(backbone).eval()
    own = tokenizer(small_data.items["title"][7].as_py(), return_tensors="pt")
    expected = torch.nn.functional.layer_norm(model(**own).last_hidden_state[0].mean(0), (32,))
    torch.testing.assert_close(found[7], expected, rtol=1e-4, atol=1e-4)
    recipe = tmp_path / "train.yaml"
    items = {"kind": "vectors", "file": str(out)}
    rec = {"model": {"dim": 16, "max_length": 8}, "items": items, "train": {"epochs": 1, "batch_size": 16}}
    recipe.write_text(yaml.safe_dump({"data": str(small_data.folder), "run": str(tmp_path / "run"), "rec": rec}))
    with pytest.raises(UserError, match=r"width 32, the model's dim is 16: .* or rec\.items\.projection=true"):
        train(load_job(recipe), "test")
    assert train(load_job(recipe, ["rec.items.projection=true", f"run={tmp_path / 'other'}"]), "test")["rows"]


def test_what_gives_no_vectors_is_one_clear_line(backbone, small_data, tmp_path):
    content = {"data": str(small_data.folder), "run": str(tmp_path / "run")}
    job = build(RecformerJob, {**content, "llm": {"recformer": {**RECFORMER, "backbone": str(backbone)}}})
    RunFolder(job.run).claim(job)
    with pytest.raises(UserError, match=r"no stage of .*run is finished: .*--stage vanilla"):
        vectors.write(str(job.run), small_data.folder, tmp_path / "x")
    assert vectors.write(str(job.run), small_data.folder, tmp_path / "x", "vanilla")["stage"] == "vanilla"
    with pytest.raises(UserError, match="neither a run folder nor a model"):
        vectors.write(str(tmp_path / "nothing"), small_data.folder, tmp_path / "x")
    with pytest.raises(UserError, match="--stage 'PT' has no meaning"):
        vectors.write(str(backbone), small_data.folder, tmp_path / "x", "PT")
    with pytest.raises(UserError, match="is a folder; name a file"):
        vectors.write(str(tmp_path / "nothing"), small_data.folder, tmp_path)
