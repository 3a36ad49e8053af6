"""stage-FT1 and FT2's loss and table, scoring, and evaluation on several ranks."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_recformer import RECFORMER
from torch.nn import functional as F
from worlds import prepare_anew

from llm.recformer import finetune as finetuning
from llm.recformer import recommender
from llm.recformer.batches import pad
from llm.recformer.finetune import FullSoftmax, Prefixes, Stage, finetune
from llm.recformer.job import RecformerJob
from llm.recformer.model import load_recformer
from llm.recformer.objective import Parts
from llm.recformer.pretrain import pretrain
from llm.recformer.recommender import RecformerRecommender, evaluate_on_all_ranks
from rec.data.prepared import Prepared
from rec.evaluation import evaluate_many, load_ranks
from rec.items import load_vectors
from rec.protocol import Protocol
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import build
from rec.runtime.errors import UserError
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder


def make_job(bert: Path, data: Prepared, out: Path, **finetune_settings: object) -> RecformerJob:
    stage = {**RECFORMER["finetune"], "precision": "fp32", **finetune_settings}
    recformer = {**RECFORMER, "backbone": str(bert), "pretrain": None, "finetune": stage}
    return build(RecformerJob, {"data": str(data.folder), "run": str(out), "llm": {"recformer": recformer}})


@pytest.fixture
def stage(bert, small_data, tmp_path) -> Stage:
    from llm.recformer.engine import make_accelerator

    job = make_job(bert, small_data, tmp_path / "run")
    accelerator = make_accelerator(job.settings, job.settings.finetune)
    return Stage("FT1", job, small_data, *load_recformer(job.settings), None, accelerator)


def alone(stage: Stage, item: int) -> torch.Tensor:
    """The vector of one item, encoded by itself without padding."""
    own = pad(stage.maker([np.array([item])]), np.array([0]), stage.tokenizer.pad_token_id)
    with torch.no_grad():
        return stage.loss.model.eval()(own.to(stage.engine.device)).last_hidden_state[0, 0]


def test_the_table_is_every_item_encoded_alone_and_what_the_loss_sees(stage, small_data):
    with torch.no_grad():  # as if an epoch had moved the model
        for parameter in stage.loss.model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    stage._refresh_table(0)
    for item in (1, 7, 30):
        torch.testing.assert_close(stage.loss.table[item - 1], alone(stage, item), rtol=1e-4, atol=1e-5)
    histories, targets = [np.array([3, 4]), np.array([9]), np.array([1, 2, 5])], torch.tensor([4, 9, 29])
    loss, _ = stage.loss(stage.maker(histories), targets, 1.0)
    losses = []
    for history, target in zip(histories, targets.tolist(), strict=True):
        own = pad(stage.maker([history]), np.array([0]), stage.tokenizer.pad_token_id)
        state = stage.loss.model(own.to(stage.engine.device)).last_hidden_state[0, 0]
        scores = [math.nan] * small_data.n_items
        for item in range(small_data.n_items):
            row = stage.loss.table[item]
            scores[item] = (state @ row / (state.norm() * row.norm())).item() / 0.05
        losses.append(-torch.tensor(scores).log_softmax(0)[target].item())
    assert loss.item() == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_the_loop_refreshes_once_an_epoch_before_any_of_its_losses(stage, monkeypatch):
    happened: list[str] = []
    refresh, step = stage._refresh_table, stage._step
    monkeypatch.setattr(stage, "_refresh_table", lambda epoch: (happened.append(f"table {epoch}"), refresh(epoch)))
    monkeypatch.setattr(stage, "_step", lambda at, epoch: (happened.append(f"step {epoch}"), step(at, epoch))[1])
    stage.loop()
    expected = []
    for epoch in range(stage.epochs):
        expected += [f"table {epoch}", *[f"step {epoch}"] * stage.prefixes.steps]
    assert happened == expected[: len(happened)]
    assert len(happened) >= 2 * (1 + stage.prefixes.steps)


def test_the_catalog_is_encoded_once_before_the_first_epoch_and_not_at_all_for_a_checkpoint(
    bert, small_data, tmp_path, monkeypatch
):
    encoded: list[int] = []
    plain = finetuning.encode_items
    monkeypatch.setattr(finetuning, "encode_items", lambda *inputs: (encoded.append(1), plain(*inputs))[1])
    job = make_job(bert, small_data, tmp_path / "run", epochs=2, fixed_epochs=1, checkpoint_every=1, patience=99)
    saved = Checkpoints.save

    def save_then_die(self, step, *inputs):
        saved(self, step, *inputs)
        if step == 7:  # in the second epoch of five steps
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "save", save_then_die)
        with pytest.raises(KeyboardInterrupt):
            finetune(job)
    assert len(encoded) == 2
    finetune(job)
    assert len(encoded) == 2


def test_as_many_checkpoints_stay_as_the_recipe_says_and_some_for_good(bert, small_data, tmp_path):
    kept = {"checkpoint_every": 1, "keep_checkpoints": 2, "keep_checkpoint_every": 4}
    job = make_job(bert, small_data, tmp_path / "run", epochs=2, fixed_epochs=1, **kept)
    finetune(job)
    steps = [found.step for found in Checkpoints(job.finetune_folder / "FT1" / "checkpoints").examine()]
    assert steps == [10, 9, 8, 4]


@pytest.mark.parametrize("asked", [False, True])
def test_test_items_are_ranked_by_the_second_stage_alone_unless_asked_for(bert, small_data, tmp_path, asked):
    job = make_job(bert, small_data, tmp_path / "run", epochs=1, fixed_epochs=1, test_first_stage=asked)
    facts = finetune(job)
    assert (facts["FT1"]["test"] != {}) == asked
    kept = load_ranks(job.finetune_folder / "FT2" / "ranks-elephant-full.safetensors", (5, 10))
    assert kept.summary() == pytest.approx(facts["FT2"]["test"]["elephant-full"])


def test_the_second_stage_trains_the_encoder_from_the_firsts_best_and_the_table_at_its_own_rate(
    bert, small_data, tmp_path
):
    found = {}
    for name, more in (
        ("fixed", {}),
        ("slow", {"train_table": True, "table_lr": 1e-4}),
        ("fast", {"train_table": True}),
    ):
        settings = {"epochs": 2, "fixed_epochs": 3, "evaluate_every": 1, "patience": 99, "lr": 1e-3, **more}
        job = make_job(bert, small_data, tmp_path / name, **settings)
        facts = finetune(job)
        folders = [job.finetune_folder / stage for stage in ("FT1", "FT2")]
        found[name] = [load_file(folder / "item_vectors.safetensors")["vectors"] for folder in folders]
        rows = RunFolder(job.run).steps("ft2_step")
        assert len(rows) == 3 * 5
        assert all(row["loss"] > 0 for row in rows)
        # What it begins with is judged too, and is FT1's best: it can only get better.
        assert facts["FT2"]["valid_NDCG@10"] >= facts["FT1"]["valid_NDCG@10"]
        state = torch.load(folders[1] / "checkpoints/step-15/rank-0.pt", "cpu", weights_only=True)["state"]
        last, first = state["module"], load_file(folders[0] / "model/model.safetensors")
        assert any(not torch.equal(last[f"model.{key}"], value) for key, value in first.items())
        found[name].append(last["table"])
    assert torch.equal(found["fixed"][0], found["fixed"][2])
    moved = {name: (own[2] - own[0]).abs().mean() for name, own in found.items()}
    assert moved["fast"] > 5 * moved["slow"] > 0


@pytest.mark.parametrize("train_table", [False, True])
def test_the_table_has_gradients_only_if_it_is_trained_along(stage, train_table):
    loss = FullSoftmax(stage.loss.model, stage.loss.table.detach(), stage.stage, 0, train_table)
    value, _ = loss(stage.maker([np.array([3, 4])]), torch.tensor([4]), 1.0)
    value.backward()
    assert (loss.table.grad is not None) == train_table


def test_prefixes_are_one_a_user_and_uniform(small_data):
    stage = build(RecformerJob, {"data": "x", "run": "y", "llm": {"recformer": {"finetune": {"batch_size": 16}}}})
    prefixes = Prefixes(small_data, stage.settings.finetune)
    assert prefixes.steps == 3
    lengths: list[int] = []
    for epoch in range(100):
        for step in range(prefixes.steps):
            histories, items = prefixes.batch(epoch, step)
            assert len(histories) == len(items)
            lengths += map(len, histories)
    assert len(lengths) == 100 * 40
    counts = np.bincount(lengths)
    assert counts[0] == 0
    assert len(counts) == 12  # 12 training items: histories of 1 to 11
    assert abs(counts[1:] - 4000 / 11).max() < 5 * math.sqrt(4000 / 11)


def test_scores_are_cosines_over_the_temperature_and_ranks_share_the_evaluation(stage, small_data, monkeypatch):
    stage._refresh_table(0)
    model, table = stage.loss.model, stage.loss.table.detach()
    parts = Parts(model, stage.tokenizer.pad_token_id, stage.stage)
    scorer = RecformerRecommender(model, table, stage.maker, parts).eval()
    items, lengths = small_data.histories("test", [0, 5], 6)
    with torch.no_grad():
        scores = scorer.score_all(torch.tensor([0, 5]), items, lengths)
        states = model.vectors(pad(stage.maker([row.numpy() for row in items]), np.arange(2), 0).to(table.device))
    expected = F.cosine_similarity(states[:, None], table[None], dim=-1) / 0.05
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-4)

    protocols = {"all": Protocol(), "warm": Protocol(cold_targets="drop", cutoffs=(5,))}
    # Every other target is cold: one of two ranks would have no other.
    counts = small_data.train_counts.clone()
    counts[small_data.targets("test")[1::2]] = 0
    cold = counts[small_data.targets("test")] == 0
    assert cold[1::2].all()
    assert not cold[::2].all()
    data = replace(small_data)
    data.__dict__["train_counts"] = counts
    whole = evaluate_many(scorer, data, "test", protocols, 16)
    found = []

    def gather(into, own):
        found.append(own)
        into[:] = [own] * len(into)

    for rank in range(2):
        monkeypatch.setattr(Ranks, "current", classmethod(lambda cls, rank=rank: cls(rank, 2)))
        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        evaluate_on_all_ranks(scorer, data, "test", protocols, 16)
    monkeypatch.undo()
    for name, metrics in whole.items():
        joined = recommender._joined([own[name] for own in found])
        assert torch.equal(joined.instances, metrics.instances)
        torch.testing.assert_close(joined.ranks, metrics.ranks)


def test_validation_is_of_the_validation_items_with_the_table_as_it_is(stage, small_data):
    stage._refresh_table(0)
    parts = Parts(stage.loss.model, stage.tokenizer.pad_token_id, stage.stage)
    scorer = RecformerRecommender(stage.loss.model, stage.loss.table.detach(), stage.maker, parts).eval()
    protocols = {"own": stage.stage.evaluate.protocol}
    by_hand = evaluate_many(scorer, small_data, "valid", protocols, 7)["own"].summary()
    assert stage._judge(0) == pytest.approx(by_hand)
    assert by_hand != pytest.approx(evaluate_many(scorer, small_data, "test", protocols, 7)["own"].summary())


def test_some_test_items_are_ranked_as_they_are_among_all(stage):
    stage._refresh_table(0)
    whole = stage.evaluate("test")
    stage.stage = stage.stage.model_copy(update={"test_users": 9})
    for name, some in stage.evaluate("test").items():
        assert len(some.ranks) <= 9 < len(whole[name].ranks)
        assert torch.equal(some.ranks, whole[name].of(torch.isin(whole[name].instances, some.instances)).ranks)


def test_a_stage_that_gets_no_better_ends_after_its_patience(bert, small_data, tmp_path):
    still = {"lr": 1e-12, "epochs": 9, "fixed_epochs": 0, "evaluate_every": 1, "patience": 2}
    job = make_job(bert, small_data, tmp_path / "run", **still)
    assert finetune(job)["FT1"]["best_epoch"] == -1
    assert len(RunFolder(job.run).steps("ft1_step")) == (1 + 2) * 5  # the first trained epoch is the best of these


def test_patience_goes_by_what_was_trained(stage, monkeypatch):
    told = iter([0.5, 0.1, 0.2, 0.2, 0.3, 0.1])
    figures = SimpleNamespace(summary=lambda: {finetuning.STOP_METRIC: next(told)})
    monkeypatch.setattr(stage, "evaluate", lambda part: {"valid": figures})
    waited = []
    for epoch in range(-1, 5):
        stage._judge(epoch)
        waited.append(stage.waited)
    assert waited == [0, 0, 0, 1, 0, 1]
    assert (stage.best, stage.best_epoch) == (0.5, -1)


def test_gradients_are_clipped(bert, small_data, tmp_path):
    moved = {}
    for clip in (None, 1e-12):  # far below AdamW's epsilon, which alone lets a gradient's size matter
        job = make_job(bert, small_data, tmp_path / str(clip), epochs=1, fixed_epochs=0, patience=99, clip_norm=clip)
        finetune(job)
        state = torch.load(job.finetune_folder / "FT1/checkpoints/step-3/rank-0.pt", "cpu", weights_only=True)["state"]
        before = load_recformer(job.settings)[0].state_dict()
        moved[clip] = max((state["module"][f"model.{name}"] - value).abs().max() for name, value in before.items())
    assert moved[1e-12] < 1e-3 * moved[None]


def test_a_last_batch_without_a_row_for_every_rank_is_left_out(small_data, monkeypatch):
    stage = build(RecformerJob, {"data": "x", "run": "y", "llm": {"recformer": {"finetune": {"batch_size": 13}}}})
    assert Prefixes(small_data, stage.settings.finetune).steps == 4  # 13, 13, 13 and 1 of the 40 users
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(0, 2)))
    assert Prefixes(small_data, stage.settings.finetune).steps == 3
    monkeypatch.setattr(Ranks, "current", classmethod(lambda cls: cls(0, 41)))
    with pytest.raises(UserError, match=r"40 users .* fewer than llm\.recformer\.processes=41"):
        Prefixes(small_data, stage.settings.finetune)


def test_nothing_is_tuned_with_none_and_the_stages_are_only_judged(bert, small_data, tmp_path):
    job = make_job(bert, small_data, tmp_path / "run", tune_layers="none")
    facts = finetune(job)
    assert facts["FT1"]["best_epoch"] == facts["FT2"]["best_epoch"] == -1
    before = load_recformer(job.settings)[0].state_dict()
    after = load_file(job.finetune_folder / "FT2/model/model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_with_a_fixed_encoder_the_second_stage_still_trains_the_table(bert, small_data, tmp_path):
    job = make_job(bert, small_data, tmp_path / "run", tune_layers="none", train_table=True)
    finetune(job)
    run = RunFolder(job.run)
    assert not run.steps("ft1_step")
    assert len(run.steps("ft2_step")) == 3 * 5
    state = torch.load(job.finetune_folder / "FT2/checkpoints/step-15/rank-0.pt", "cpu", weights_only=True)["state"]
    moved = state["module"]["table"] - load_vectors(job.finetune_folder / "FT1/item_vectors.safetensors", small_data)
    assert moved.abs().max() > 1e-3
    before = load_recformer(job.settings)[0].state_dict()
    after = load_file(job.finetune_folder / "FT2/model/model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_what_would_only_fail_at_the_end_is_said_at_once(bert, small_data, tmp_path):
    with pytest.raises(UserError, match="100 negatives cannot be drawn"):
        finetune(make_job(bert, small_data, tmp_path / "a", protocols=["elephant-100"]))
    with pytest.raises(UserError, match="best 50 of 30 items"):
        finetune(make_job(bert, small_data, tmp_path / "b", evaluate={"cutoffs": [10, 50]}))
    with pytest.raises(UserError, match="unknown protocol 'elephant'"):
        make_job(bert, small_data, tmp_path / "c", protocols=["elephant"])
    assert not (tmp_path / "a" / "finetune").exists()


def test_what_was_trained_on_other_data_is_not_taken_for_this(bert, small_data, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(small_data.folder, data)
    job = make_job(bert, Prepared.load(data), tmp_path / "run", tune_layers="none")
    finetune(job)
    assert len(job.finished("finetune")) == 2
    shutil.rmtree(job.finetune_folder / "FT2")
    prepare_anew(data)
    with pytest.raises(UserError, match=r"FT1 was trained on other data than there is now"):
        finetune(job)


def test_what_began_with_another_backbone_is_not_taken_for_this(bert, small_data, tmp_path):
    backbone = tmp_path / "backbone"
    shutil.copytree(bert, backbone)
    pretraining = {**RECFORMER["pretrain"], "epochs": 1, "precision": "fp32"}
    stages = {"pretrain": (pretrain, pretraining), "finetune": (finetune, RECFORMER["finetune"])}
    for name, (run, stage) in stages.items():
        own = {**RECFORMER, "backbone": str(backbone), "pretrain": None, "finetune": None, name: stage}
        content = {"data": str(small_data.folder), "run": str(tmp_path / name), "llm": {"recformer": own}}
        job = build(RecformerJob, content)
        assert run(job) == run(job)
        weights = load_file(backbone / "model.safetensors")
        save_file({key: value + 1 for key, value in weights.items()}, backbone / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="was trained from another backbone than there is now"):
            run(job)
