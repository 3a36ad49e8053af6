"""The stages as users start them: killed and resumed, on one rank and two, under DDP and DeepSpeed."""

import json
from pathlib import Path

import pytest
import torch
from backbones import save_bert
from safetensors.torch import load_file
from tiny_recformer import assert_same_bits, finish, kill_once_at, weights, write_recipe

from llm.recformer.batches import SequenceMaker
from llm.recformer.finetune import finetune
from llm.recformer.job import load_job
from llm.recformer.model import load_recformer
from llm.recformer.pretrain import BatchMaker, accuracy_of, make_objective, pretrain
from llm.recformer.sources import Sources
from llm.recformer.text import item_tokens
from rec.runtime.runfolder import RunFolder

STAGES = ("pretrain", "finetune/FT1", "finetune/FT2")


@pytest.fixture(scope="module")
def dropping(tmp_path_factory) -> Path:
    """A backbone with dropout, which only an exact resume draws again alike."""
    return save_bert(tmp_path_factory.mktemp("dropping") / "model", dropout=0.1)


@pytest.fixture(scope="module")
def whole(dropping, small_data, tmp_path_factory) -> Path:
    """The run folder of all stages, run without interruption."""
    recipe = write_recipe(tmp_path_factory.mktemp("whole"), small_data.folder, dropping)
    for stage in ("pretrain", "finetune"):
        finish(recipe, stage)
    return recipe.parent / "run"


@pytest.mark.distributed
def test_stages_that_were_killed_end_with_the_same_bits(whole, dropping, small_data, tmp_path):
    recipe = write_recipe(tmp_path, small_data.folder, dropping)
    run = tmp_path / "run"
    kill_once_at(recipe, "pretrain", run / "pretrain/checkpoints/step-9")
    finish(recipe, "pretrain")
    kill_once_at(recipe, "finetune", run / "finetune/FT1/checkpoints/step-9")
    kill_once_at(recipe, "finetune", run / "finetune/FT2/checkpoints/step-6")
    finish(recipe, "finetune")
    for stage in STAGES:
        assert_same_bits(weights(run / stage / "model"), weights(whole / stage / "model"))
        own, other = (json.loads((folder / stage / "finished.json").read_text()) for folder in (run, whole))
        assert own == other
    for stage in STAGES[1:]:
        tables = [load_file(folder / stage / "item_vectors.safetensors") for folder in (run, whole)]
        assert_same_bits(*tables)
    for event in ("pt_step", "ft1_step", "ft2_step"):
        losses = [[row["loss"] for row in RunFolder(folder).steps(event)] for folder in (run, whole)]
        assert losses[0] == losses[1]


@pytest.mark.distributed
def test_training_learns_and_the_second_stage_keeps_the_firsts_table(whole):
    losses = [row["loss"] for row in RunFolder(whole).steps("pt_step")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    first, second = (json.loads((whole / stage / "finished.json").read_text()) for stage in STAGES[1:])
    assert second["valid_NDCG@10"] >= first["valid_NDCG@10"]
    tables = [load_file(whole / stage / "item_vectors.safetensors")["vectors"] for stage in STAGES[1:]]
    assert torch.equal(*tables)
    # One refresh an epoch, before its first step.
    refreshed = [row["step"] for row in RunFolder(whole).events("table")]
    epochs = sorted({row["epoch"] for row in RunFolder(whole).steps("ft1_step")})
    assert refreshed == epochs


@pytest.mark.distributed
@pytest.mark.parametrize(
    "deepspeed", [pytest.param(False, marks=pytest.mark.slow, id="DDP"), pytest.param(True, id="ZeRO-2")]
)
def test_two_ranks_train_as_one_does_and_resume_exactly(bert, small_data, tmp_path, deepspeed):
    runs = {}
    for name, processes in (("one", 1), ("two", 2), ("killed", 2), ("fewer", 2)):
        (tmp_path / name).mkdir()
        own = {"processes": processes, "zero_stage": 2 if deepspeed and processes == 2 else 0}
        stage = {"precision": "fp32", "epochs": 8}
        fine = {"precision": "fp32", "epochs": 2, "fixed_epochs": 1, "train_table": True, "evaluate_every": 1}
        fine["users_per_epoch"] = 0.93  # 37 users: two ranks cannot halve the last batch
        recipe = write_recipe(tmp_path / name, small_data.folder, bert, **own, pretrain=stage, finetune=fine)
        runs[name] = run = tmp_path / name / "run"
        if name in ("killed", "fewer"):
            kill_once_at(recipe, "pretrain", run / "pretrain/checkpoints/step-3", processes, deepspeed)
        if name == "fewer":
            own["processes"] = processes = 1
            write_recipe(tmp_path / name, small_data.folder, bert, **own, pretrain=stage, finetune=fine)
        finish(recipe, "pretrain", processes, deepspeed and name != "one")
        if name in ("one", "two"):
            finish(recipe, "finetune", processes, deepspeed and processes == 2)
    assert_same_bits(weights(runs["killed"] / "pretrain/model"), weights(runs["two"] / "pretrain/model"))
    # What is saved is what was best.
    job = load_job(tmp_path / "one" / "recipe.yaml")
    model, tokenizer = load_recformer(job.settings.model_copy(update={"backbone": str(job.pretrain_folder / "model")}))
    sources = Sources([small_data], job.settings.pretrain)
    tokens = item_tokens(small_data, job.settings.text, tokenizer, tmp_path / "tokens")
    maker = SequenceMaker(tokens, job.settings.size, tokenizer.cls_token_id)
    objective = make_objective(model, job, tokenizer)
    accuracy = accuracy_of(
        objective, sources, BatchMaker(maker, job.settings.pretrain, tokenizer.mask_token_id, len(tokenizer))
    )
    assert accuracy == json.loads((runs["one"] / "pretrain/finished.json").read_text())["valid_accuracy"]
    # The best step too, although accuracies of 40 users are often equal.
    one, two = (json.loads((runs[name] / "pretrain/finished.json").read_text()) for name in ("one", "two"))
    assert (one["valid_accuracy"], one["best_step"]) == (two["valid_accuracy"], two["best_step"])
    for event in ("pt_step", "ft1_step", "ft2_step"):
        one, two = ([row["loss"] for row in RunFolder(runs[name]).steps(event)] for name in ("one", "two"))
        assert two == pytest.approx(one, rel=2e-3)
    killed, fewer, two = (RunFolder(runs[name]).steps("pt_step") for name in ("killed", "fewer", "two"))
    assert all(rows[0]["pid"] != rows[-1]["pid"] for rows in (killed, fewer))  # or they were killed too late
    assert [row["loss"] for row in fewer] == pytest.approx([row["loss"] for row in two], rel=2e-3)
    tables = [load_file(runs[name] / "finetune/FT2/item_vectors.safetensors")["vectors"] for name in ("one", "two")]
    torch.testing.assert_close(*tables, rtol=0.02, atol=0.02)


@pytest.mark.distributed
def test_finetuning_that_goes_on_with_fewer_ranks_keeps_the_epochs_table(bert, small_data, tmp_path):
    losses = {}
    for name in ("whole", "fewer"):
        (tmp_path / name).mkdir()
        fine = {"precision": "fp32", "epochs": 2, "fixed_epochs": 0, "patience": 99}
        own = {"processes": 2, "zero_stage": 2, "pretrain": None, "finetune": fine}
        recipe = write_recipe(tmp_path / name, small_data.folder, bert, **own)
        if name == "fewer":  # in the second of five steps an epoch
            kill_once_at(recipe, "finetune", tmp_path / name / "run/finetune/FT1/checkpoints/step-6", 2, True)
            own["processes"] = 1
            write_recipe(tmp_path / name, small_data.folder, bert, **own)
        finish(recipe, "finetune", own["processes"], deepspeed=True)
        rows = RunFolder(tmp_path / name / "run").steps("ft1_step")
        losses[name] = [row["loss"] for row in rows]
    assert rows[0]["pid"] != rows[-1]["pid"]
    assert losses["fewer"] == pytest.approx(losses["whole"], rel=2e-3)


@pytest.mark.distributed
@pytest.mark.parametrize("zero_stage", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_finetuning_on_two_ranks_that_was_killed_ends_with_the_same_bits(dropping, small_data, tmp_path, zero_stage):
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        fine = {"epochs": 1, "fixed_epochs": 1, "evaluate_every": 1, "train_table": True}
        own = {"processes": 2, "zero_stage": zero_stage, "pretrain": None, "finetune": fine}
        recipe = write_recipe(tmp_path / name, small_data.folder, dropping, **own)
        if name == "killed":
            checkpoint = tmp_path / name / "run/finetune/FT2/checkpoints/step-3"
            kill_once_at(recipe, "finetune", checkpoint, 2, zero_stage > 0)
        finish(recipe, "finetune", 2, zero_stage > 0)
    for file in ("model/model.safetensors", "item_vectors.safetensors"):
        assert_same_bits(*(load_file(tmp_path / name / "run/finetune/FT2" / file) for name in ("whole", "killed")))
    rows = RunFolder(tmp_path / "killed" / "run").steps("ft2_step")
    assert rows[0]["pid"] != rows[-1]["pid"]


def test_a_longformer_is_trained_through_all_stages(longformer, small_data, tmp_path):
    own = {
        "size": {"attention_window": 8},
        "pretrain": {"precision": "fp32"},
        "finetune": {"precision": "fp32", "epochs": 2},
    }
    job = load_job(write_recipe(tmp_path, small_data.folder, longformer, **own))
    before = load_recformer(job.settings)[0].state_dict()
    pretrain(job)
    losses = [row["loss"] for row in RunFolder(job.run).steps("pt_step")]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert finetune(job)["FT2"]["test"]["elephant-full"]["NDCG@10"] > 0
    after = weights(job.pretrain_folder / "model")
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    # [CLS] has projections of its own, which nothing but its global attention trains.
    assert {f"backbone.encoder.layer.{layer}.attention.self.query_global.weight" for layer in range(3)} <= changed
