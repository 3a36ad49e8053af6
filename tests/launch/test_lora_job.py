"""A main job with adapters, a text encoder that recommenders train, and a last recommender from scratch, for real."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_job import RECIPE, ROOT, STEPS
from transformers import LlamaConfig, LlamaForCausalLM

from align.config import Stages
from align.snapshots import SnapshotStore
from llm.text_items import TrainedText
from llm.tokenizer import train_tokenizer
from rec.data.prepared import Prepared
from rec.models.base import SequenceRecommender
from rec.runtime.runfolder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.vllm]


def tiny_llama(folder: Path, data: Prepared) -> Path:
    tokenizer = train_tokenizer(data.items["title"].to_pylist(), 400, 64)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    config.eos_token_id = tokenizer.eos_token_id
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_of(small_data: Prepared, folder: Path) -> RunFolder:
    recipe = copy.deepcopy(RECIPE)
    recipe["llm"]["model"] = str(tiny_llama(folder / "llama", small_data))
    recipe["llm"]["encoder"] = {"trained": True, "lr": 1e-3}
    recipe["align"]["finish_from"] = "scratch"
    recipe["align"]["trainer"]["lora"] = {"rank": 4, "alpha": 8}
    recipe["align"]["trainer"]["lr"] = 1e-2
    recipe |= {"data": str(small_data.folder), "run": str(folder / "run")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return RunFolder(folder / "run")


def recalign(*arguments: str) -> str:
    command = [sys.executable, "-m", "launch.cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout + done.stderr


def test_a_whole_job_with_adapters_and_trained_encoders(small_data, tmp_path):
    run = run_of(small_data, tmp_path)
    recalign("align", str(tmp_path / "recipe.yaml"))
    stages, newest = Stages(run.path), SnapshotStore(Stages(run.path).snapshots).newest()
    assert newest.step == STEPS
    held = {path.name for path in newest.llm.iterdir()}
    assert "adapter_model.safetensors" in held
    assert "model.safetensors" not in held
    loaded = run.events("refresh")
    assert len({row["version"] for row in loaded}) >= 4
    assert max(row["canary_max_difference"] for row in loaded) < 1e-3
    # The adapters have moved, so loading them anew was no idle exercise.
    assert run.steps("train")[-1]["kl"] != 0

    folders = (stages.without_reward_users / "na" / "model", newest.recommender, stages.na / "model")
    before, aligned, not_aligned = (SequenceRecommender.from_pretrained(folder).items for folder in folders)
    for items in (before, aligned, not_aligned):
        assert isinstance(items, TrainedText)
    for name, value in before.encoder.state_dict().items():
        if value.is_floating_point() and value.dim() > 1:
            assert not torch.equal(value, aligned.encoder.state_dict()[name]), name
    assert not torch.equal(before.knowledge, aligned.knowledge)
    assert [row["method"] for row in run.result()["rows"]] == ["Base", "Base+NA_LLM", "Base+SeRALM"]

    # The recommender that alignment trained is seen too, although the last one is new.
    ablations = {row["method"]: row["HR@10"] for row in run.result()["ablations"]}
    assert list(ablations) == ["A_LLM+NA_Rec", "NA_LLM+A_Rec", "A_LLM+A_Rec, as aligned", "NA_LLM+A_Rec, as aligned"]
    assert all(0 <= value <= 1 for value in ablations.values())

    assert "a replay ends with the same weights: yes" in recalign("align", "--replay", str(run.path))
    said = recalign("knowledge", str(run.path), "--out", str(tmp_path / "knowledge.parquet"))
    assert "60 texts encoded, 0 kept" in said
