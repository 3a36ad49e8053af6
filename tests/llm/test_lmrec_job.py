"""The LMRec job as users start it: accelerate, DeepSpeed, two ranks; and its recipe."""

import gzip
import itertools
import math
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from pretraining import LLM, STEPS, final, finish, job, recipe, start
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)
from worlds import make_raw, prepare_anew

from llm import joint, lmrec_run
from llm.lmrec_job import LMRecEvaluation, LMRecJob, LMRecLLM, LMRecTrainConfig, load_job
from llm.lmrec_run import _tasks, read_inputs, run
from llm.tokenizer import train_tokenizer
from llm.training import STEP, Training
from rec.data.prepare import Filters, prepare
from rec.data.prepared import Prepared
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import build
from rec.runtime.errors import Stopped, UserError
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder
from rec.runtime.stopping import StopFile


def figures(folder, *names):
    return [tuple(row[name] for name in names if name in row) for row in RunFolder(folder).steps(STEP)]


LOSSES = ("loss", "pairs_target", "valid_target", "lr", "weight", "gradient_norm")


@pytest.fixture(scope="module")
def plain(small_data, tmp_path_factory):
    """One process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("plain")
    job = load_job(recipe(folder, small_data.folder, zero_stage=0))
    run(job, "test")
    return folder / "run"


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, *(pytest.param(own, marks=pytest.mark.slow) for own in (1, 3))])
def test_two_ranks_of_zero_equal_one_plain_process_and_resume_bit_for_bit_or_on_other_ranks(
    tmp_path, small_data, plain, stage
):
    whole = tmp_path / "whole"
    whole.mkdir()
    path = recipe(whole, small_data.folder, zero_stage=stage, processes=2)
    finish(path, start(path, port=29700 + stage))
    for own, expected in zip(figures(whole / "run", *LOSSES), figures(plain, *LOSSES), strict=True):
        assert own == pytest.approx(expected, rel=2e-3)
    alone = final(plain)
    for name, value in final(whole / "run").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-2, atol=2e-3, msg=lambda m, k=name: f"{k}: {m}")

    killed = tmp_path / "killed"
    killed.mkdir()
    path = recipe(killed, small_data.folder, zero_stage=stage, processes=2)
    process = start(path, port=29700 + stage)
    checkpoints, end = Checkpoints(killed / "run" / "checkpoints"), time.monotonic() + 240
    while not checkpoints.last_step() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    # The first rank alone; whoever started it ends the other one.
    os.kill(RunFolder(killed / "run").events(STEP)[-1]["pid"], signal.SIGKILL)
    assert process.wait(120) != 0
    assert not (killed / "run" / "finished.json").exists()
    other_world = tmp_path / "other-world"
    shutil.copytree(killed, other_world)
    finish(path, start(path, port=29710 + stage))
    assert "resuming" in (killed / "log.txt").read_text()
    assert figures(killed / "run", *LOSSES) == figures(whole / "run", *LOSSES)
    one, other = final(whole / "run"), final(killed / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)

    processes = {1: 1, 2: 4, 3: 1}[stage]
    path = recipe(other_world, small_data.folder, zero_stage=stage, processes=processes)
    finish(path, start(path, ranks=processes, port=29720 + stage))
    assert f"{processes} processes go on for 2" in (other_world / "log.txt").read_text()
    for own, expected in zip(figures(other_world / "run", *LOSSES), figures(plain, *LOSSES), strict=True):
        assert own == pytest.approx(expected, rel=2e-3)


def test_what_is_left_is_a_stock_model_heads_and_test_figures(plain):
    model, tokenizer = (kind.from_pretrained(plain / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.architectures == ["GPT2LMHeadModel"]
    assert model.config.vocab_size == len(tokenizer)
    assert {"target.item.linear.weight", "target.user.linear.weight"} <= set(final(plain))
    result = RunFolder(plain).result()
    assert result["rows"][0]["model"] == "LMRec"
    assert 0 < result["rows"][0]["HR@10"] <= 1
    assert result["training"]["steps"] == STEPS
    steps = RunFolder(plain).steps(STEP)
    assert all(row["tokens_per_s"] > 0 and row["mfu"] == 0 for row in steps)
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]


def test_a_killed_and_resumed_plain_run_is_the_same_with_every_task_and_source(tmp_path, small_data, monkeypatch):
    (tmp_path / "text.txt").write_text("Once upon a time\n\nthere was a thing.\n\n" * 30)
    more = {
        "tasks": {"second": {"data": str(small_data.folder), "item_text": "{kind}: {title}"}},
        "corpus": {"specific": 0.7, "agnostic": [{"text": str(tmp_path / "text.txt"), "share": 0.05}]},
        "recommend": {**LLM["recommend"], "standardise": True, "heads_lr_factor": 3},
        "train": {"patience": 6, "activation_checkpointing": True},
    }
    for name in "ab":
        (tmp_path / name).mkdir()
    one = job(tmp_path / "a", small_data, **more)
    run(one, "test")
    saved, count = Checkpoints.save, []

    def die_at_the_second(self, *args, **kwargs):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return saved(self, *args, **kwargs)

    other = job(tmp_path / "b", small_data, **more)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", die_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(other, "test")
    run(other, "test")
    names = (*LOSSES, "pairs_second", "valid_second")
    assert figures(tmp_path / "a" / "run", *names) == figures(tmp_path / "b" / "run", *names)
    first, second = final(tmp_path / "a" / "run"), final(tmp_path / "b" / "run")
    assert {"second.user.linear.weight", "target.user.mean", "target.item.deviation"} <= set(first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert RunFolder(one.run).result()["rows"][0]["model"] == "LMRec +agnostic"


def test_the_in_house_protocol_holds_users_out_and_ranks_among_negatives(tmp_path):
    prepare("test", make_raw(tmp_path / "raw"), tmp_path / "data", Filters(split="users", cold_items="drop"))
    data = Prepared.load(tmp_path / "data")
    own = job(tmp_path, data, train={"steps": 3}).model_copy(
        update={
            "rec": build(LMRecEvaluation, {"evaluate": {"candidates": "sampled", "negatives": 12, "split": "users"}})
        }
    )
    run(own, "test")
    result = RunFolder(own.run).result()
    assert (result["protocol"]["candidates"], result["protocol"]["negatives"]) == ("sampled", 12)
    held_out = set(data.instances("test")[0].tolist()) | set(data.instances("valid")[0].tolist())
    [task] = _tasks(own, read_inputs(own, RunFolder(own.run), Ranks()), Ranks())
    trained_on = torch.searchsorted(data.offsets, torch.from_numpy(task.spans[:, 0].copy()), right=True) - 1
    assert held_out
    assert not held_out & set(trained_on.tolist())


def test_rates_and_weights_of_the_log_are_the_recipes(plain):
    job = load_job(plain / "config.yaml")
    train, weight = job.llm.train, job.llm.recommend.recommendation_weight
    warmup, final = max(1, round(train.warmup * train.steps)), train.final_fraction

    def decayed(share: float) -> float:
        return final + (1 - final) * (1 + math.cos(math.pi * share)) / 2

    rows = figures(plain, "lr", "weight")
    assert len(rows) == train.steps > warmup
    for step, (lr, own) in enumerate(rows):
        share = (step - warmup) / (train.steps - warmup)
        assert lr == pytest.approx(train.lr * ((step + 1) / warmup if share < 0 else decayed(share)))
        assert own == pytest.approx(weight * decayed(step / train.steps))


def test_training_stops_when_patience_runs_out_and_keeps_the_best(tmp_path, small_data, monkeypatch):
    validate, seen = Training._validate, {}

    def validate_and_keep(self, step):
        seen[step] = self.engine.weights()
        return validate(self, step)

    monkeypatch.setattr(Training, "_validate", validate_and_keep)
    settings = {"lr": 0.5, "steps": 60, "patience": 6, "clip_norm": 100.0}  # a rate that makes it worse
    run(job(tmp_path, small_data, train=settings), "test")
    rows = RunFolder(tmp_path / "run").steps(STEP)
    valid = {row["step"] + 1: row["valid_target"] for row in rows if "valid_target" in row}
    best = min(valid, key=valid.get)
    assert len(rows) == best + 6 < 60
    assert RunFolder(tmp_path / "run").result()["training"]["best_step"] == best
    saved = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(value, seen[best][f"decoder.{name}"]) for name, value in saved.items())


def test_a_run_whose_data_were_prepared_anew_is_not_gone_on_with(tmp_path, small_data, monkeypatch):
    data = tmp_path / "data"
    shutil.copytree(small_data.folder, data)
    own = job(tmp_path, Prepared.load(data))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(lmrec_run, "_conclude", killed)
        with pytest.raises(KeyboardInterrupt):
            run(own, "test")
    prepare_anew(data)
    with pytest.raises(UserError, match=r"the data or the model that .*run reads were made anew since it was begun"):
        run(own, "test")


def test_self_pretraining_starts_from_the_other_runs_weights(tmp_path, small_data):
    (tmp_path / "first").mkdir()
    run(job(tmp_path / "first", small_data, recommend=None), "test")
    assert RunFolder(tmp_path / "first" / "run").result()["rows"] == []
    fine = {"language": False, "model": str(tmp_path / "first" / "run"), "train": {"steps": 1, "lr": 1e-9}}
    run(job(tmp_path, small_data, **fine), "test")
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "run" / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").state_dict()
    for name in before:
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)
    assert RunFolder(tmp_path / "run").result()["rows"][0]["model"] == "SelfPretrain"
    longer = job(tmp_path / "longer", small_data, **fine, lmrec={**LLM["lmrec"], "context": 64})
    with pytest.raises(UserError, match=r"context is 64, but .* has 48 positions"):
        run(longer, "test")


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_checkpoint(tmp_path, small_data, monkeypatch):
    real, calls = joint.language_loss, itertools.count()
    # Four parts a step: from the sixth step on.
    monkeypatch.setattr(joint, "language_loss", lambda *args: real(*args) * (math.nan if next(calls) >= 20 else 1))
    with pytest.raises(UserError, match=r"loss is nan at step 5: .* last good checkpoint"):
        run(job(tmp_path, small_data), "test")
    newest = Checkpoints(tmp_path / "run" / "checkpoints").newest()
    assert newest.step == 4
    assert all(value.isfinite().all() for value in newest.state(0)["state"]["model"].values())


@pytest.mark.parametrize(
    ("llm", "message"),
    [
        ({"language": False, "recommend": None}, "nothing to train"),
        ({"language": False, "corpus": {"specific": 0.5}}, "language=false leaves out"),
        ({"recommend": {"pairs": 30, "prefixes": 4}}, "pairs 30 is not divisible"),
        (
            {"recommend": {"prefixes": 8}, "lmrec": {"context": 16, "heads": 1}, "train": {"processes": 3}},
            "not divisible",
        ),
        ({"recommend": {"pairs": 32, "prefixes": 32}, "lmrec": {"context": 32}}, "prefixes 32 leave no room"),
        ({"recommend": {"in_batch": True}}, "in_batch goes with loss=softmax"),
        ({"train": {"rows": 7, "processes": 2}}, "rows 7 is not divisible by processes 2"),
        ({"train": {"zero_stage": 0, "processes": 2}}, "zero_stage=0 is one process"),
        ({"train": {"zero_stage": 0, "precision": "fp16"}}, "loss scaling"),
        ({"train": {"patience": 5, "validate_every": 20}}, "patience 5 ends training before the next validation"),
        (
            {"train": {"patience": 50, "validate_every": 100, "patience_from": 1000}},
            "patience 50 ends training before the next validation",
        ),
        ({"tasks": {"target": {"data": "x"}}}, "names of tasks"),
        ({"tasks": {"items": {"data": "x"}}}, "a task cannot be called 'items'"),
        ({"tasks": {"loss": {"data": "x"}}}, "a task cannot be called 'loss'"),
        ({"recommend": {"micro_histories": 1}}, "micro_histories=1 leaves nothing to standardise over"),
        ({"corpus": {"agnostic": [{"share": 0.3}]}}, "exactly one of"),
        ({"train": {"seed": -1}}, r"llm.train.seed"),
        ({"train": {"betas": [0.9, 1.0]}}, r"llm.train.betas"),
    ],
)
def test_impossible_recipes_are_one_line(llm, message):
    with pytest.raises(UserError, match=message):
        build(LMRecJob, {"data": "x", "run": "y", "llm": llm})


def test_what_the_data_makes_impossible_is_one_line_too(tmp_path, small_data):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="holds no text"):
        run(job(tmp_path, small_data, corpus={"agnostic": [{"text": str(empty)}]}), "test")
    (empty / "few.txt").write_text("Some text.")
    with pytest.raises(UserError, match=r"source 1 has \d+ tokens, its share of 2 asks for"):
        run(job(tmp_path / "f", small_data, corpus={"agnostic": [{"text": str(empty), "share": 2}]}), "test")
    for template in ("{title:d}", "{title!z}"):
        with pytest.raises(UserError, match=r"llm.item_text: .*title"):
            run(job(tmp_path / "t", small_data, item_text=template), "test")
    (empty / "cut.txt.gz").write_bytes(gzip.compress(b"Some text. " * 50)[:20])
    with pytest.raises(UserError, match=r"cut.txt.gz cannot be read"):
        run(job(tmp_path / "e", small_data, corpus={"agnostic": [{"text": str(empty)}]}), "test")
    greedy = job(tmp_path / "cutoffs", small_data)
    greedy = greedy.model_copy(update={"rec": build(LMRecEvaluation, {"evaluate": {"cutoffs": [10, 31]}})})
    with pytest.raises(UserError, match=r"rec.evaluate.cutoffs asks for the best 31 of 30 items"):
        run(greedy, "test")
    with pytest.raises(UserError, match="the corpus is empty"):
        run(job(tmp_path / "b", small_data, corpus={"specific": 0.0}), "test")
    words = " ".join(f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst")
    train_tokenizer([words], 400, 48).save_pretrained(tmp_path / "c" / "run" / "tokenizer")
    smaller = {**LLM["lmrec"], "vocabulary": 300}
    with pytest.raises(UserError, match=r"has \d+ tokens, llm.lmrec.vocabulary is 300"):
        run(job(tmp_path / "c", small_data, lmrec=smaller), "test")
    with pytest.raises(UserError, match="started by accelerate launch"):
        run(job(tmp_path / "d", small_data, train={"zero_stage": 2}), "test")


def test_table_9_fills_in_what_the_recipe_leaves_out():
    llm = build(LMRecLLM, {"lmrec": {"preset": "125M"}, "train": {"lr": 1e-3}})
    assert (llm.train.lr, llm.train.weight_decay, llm.train.clip_norm) == (1e-3, 0.1, 0.1)
    assert (llm.recommend.pairs, llm.recommend.recommendation_weight) == (1024, 3e-3)
    assert (llm.train.betas, llm.train.eps, llm.train.warmup_fraction) == ((0.9, 0.98), 1e-6, 0.01)
    warmups = [LMRecTrainConfig(steps=steps).warmup * steps for steps in (50, 2000, 100_000)]
    assert warmups == pytest.approx([5, 100, 1000])
    assert build(LMRecLLM, llm.model_dump()) == llm
    assert build(LMRecLLM, {"lmrec": {"preset": "7M"}, "recommend": None}).recommend is None


def test_a_stop_file_ends_a_run_after_a_step_and_without_it_the_same_bits_come_out(tmp_path, small_data, monkeypatch):
    for name in "ab":
        (tmp_path / name).mkdir()
    run(job(tmp_path / "a", small_data), "test")
    other, count = job(tmp_path / "b", small_data), []

    def asked_at_the_fifth_step(self):
        count.append(1)
        return len(count) == 5

    with monkeypatch.context() as patch:
        patch.setattr(StopFile, "seen", asked_at_the_fifth_step)
        with pytest.raises(Stopped, match="after step 5 of pretraining"):
            run(other, "test")
    assert Checkpoints(Path(other.run) / "checkpoints").last_step() == 5
    run(other, "test")
    one, two = final(tmp_path / "a" / "run"), final(tmp_path / "b" / "run")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_as_many_checkpoints_stay_as_the_recipe_says_and_some_for_good(small_data, tmp_path):
    path = recipe(
        tmp_path,
        small_data.folder,
        zero_stage=0,
        keep_checkpoints=1,
        keep_checkpoint_every=4,
        steps=6,
        checkpoint_every=1,
    )
    run(load_job(path), "test")
    assert [found.step for found in Checkpoints(tmp_path / "run" / "checkpoints").examine()] == [6, 4]
