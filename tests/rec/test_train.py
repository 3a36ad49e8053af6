"""The training job: its result, its grid, what it opens again, and several processes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from pyarrow import parquet

from launch.commands import delete_run
from rec.config import RecConfig
from rec.evaluate import evaluate_run
from rec.items import save_vectors
from rec.job import RecJob, grid_of, load_job, open_run
from rec.models.base import Recommender
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.config import build
from rec.runtime.errors import Diverged, UserError
from rec.runtime.runfolder import RunFolder
from rec.train import run

SMALL = {
    "model": {"name": "SASRec", "dim": 16, "heads": 2, "blocks": 1, "max_length": 8, "dropout": 0.0},
    "train": {"lr": 5e-3, "batch_size": 8, "epochs": 4, "patience": 4, "checkpoint_every": 1},
}


@pytest.fixture
def recipe(small_data, tmp_path):
    """Writes a recipe with changed sections, and gives its path."""

    def write(name: str = "run", **sections) -> Path:
        rec = {key: {**SMALL.get(key, {}), **sections.get(key, {})} for key in {**SMALL, **sections}}
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            yaml.safe_dump({"data": str(small_data.folder), "run": str(tmp_path / name), "rec": rec}, sort_keys=False)
        )
        return path

    return write


def test_a_run_leaves_a_result_and_can_be_opened(recipe, small_data):
    job = load_job(recipe())
    result = run(job, "recalign train x")
    assert [row["part"] for row in result["rows"]] == ["valid", "test"]
    assert result["command"] == "recalign train x"
    protocol = result["protocol"]
    assert protocol["hash"] == job.rec.evaluate.protocol.of_run(small_data, "train").hash
    assert (protocol["split"], protocol["trained_on"]) == ("leave-one-out", "train")
    lines = [*result["rows"], *RunFolder(job.run).steps("epoch")]
    assert {line["protocol_hash"] for line in lines} == {protocol["hash"]}
    assert result["rows"][0]["NDCG@10"] == pytest.approx(result["training"]["valid_NDCG@10"])
    opened = open_run(job.run)
    assert opened.data.meta == small_data.meta
    assert run(job, "again") == result


def test_the_result_validates_as_training_did_and_tests_everybody(recipe, small_data):
    job = load_job(recipe(train={"valid_users": 6}))
    result = run(job, "")
    assert result["rows"][0]["NDCG@10"] == pytest.approx(result["training"]["valid_NDCG@10"])
    opened = open_run(job.run)
    everybody = evaluate_run(opened, {"own": opened.rec.evaluate.protocol})["own"]
    assert result["rows"][1]["NDCG@10"] == pytest.approx(everybody["NDCG@10"])
    assert len(everybody.ranks) == 40


def test_the_grid_keeps_the_best_by_validation(recipe):
    job = load_job(recipe(grid={"train.lr": [1e-6, 5e-3], "model.dropout": [0.0]}))
    result = run(job, "")
    found = result["training"]["grid"]
    assert set(found) == {"lr=1e-06,dropout=0.0", "lr=0.005,dropout=0.0"}
    assert result["training"]["chosen"] == "lr=0.005,dropout=0.0"
    assert found["lr=0.005,dropout=0.0"] > found["lr=1e-06,dropout=0.0"]
    best = Recommender.from_pretrained(job.run / "grid" / result["training"]["chosen"] / "model")
    assert torch.equal(open_run(job.run).model.items.ids.weight, best.items.ids.weight)


def test_a_rate_of_the_grid_at_which_training_diverges_is_out(recipe):
    result = run(load_job(recipe(grid={"train.lr": [1e30, 5e-3]})), "")
    assert result["training"]["chosen"] == "lr=0.005"
    assert result["training"]["grid"]["lr=1e+30"] == 0
    with pytest.raises(Diverged, match="lower the learning rate"):
        run(load_job(recipe(grid={"train.lr": [1e30, 2e30]}, name="all")), "")


def test_a_wrong_key_of_the_grid_is_known_before_anything_runs(recipe):
    with pytest.raises(UserError, match="unknown key 'lrr' in train; did you mean 'lr'"):
        load_job(recipe(grid={"train.lrr": [1]}))
    with pytest.raises(UserError, match="not divisible"):
        load_job(recipe(grid={"model.heads": [2, 3]}))
    assert list(grid_of(build(RecConfig, {"grid": {"model": ["SASRec"]}}))) == ["model=SASRec"]


def test_models_of_a_grid_have_their_own_defaults():
    names = ["SASRec", "GRU4Rec", "LightGCN"]
    grid = grid_of(build(RecConfig, {"model": {"dim": 16}, "grid": {"model.name": names}}))
    assert [(own.model.name, own.model.dim) for own in grid.values()] == [(name, 16) for name in names]
    with pytest.raises(UserError, match=r"rec.grid, name=GRU4Rec: unknown key 'blocks'"):
        grid_of(build(RecConfig, {"model": {"blocks": 1}, "grid": {"model.name": ["SASRec", "GRU4Rec"]}}))


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("train.on", ["train", "train+valid"]),
        ("train.valid_users", [None, 5]),
        ("evaluate.candidates", ["all", "sampled"]),
        ("evaluate", [{"ties": "optimistic"}]),
    ],
)
def test_members_of_a_grid_are_judged_alike(key, values):
    with pytest.raises(UserError, match=r"rec.grid, .*must be the same for all"):
        grid_of(build(RecConfig, {"grid": {key: values}}))


def test_a_member_of_a_grid_over_paths_is_one_folder():
    names = grid_of(build(RecConfig, {"grid": {"train.start": ["runs/a", "runs/b"]}}))
    assert list(names) == ["start=runs%2Fa", "start=runs%2Fb"]


def test_training_on_validation_items_runs_all_epochs_and_says_so(recipe, small_data):
    job = load_job(recipe(train={"on": "train+valid"}))
    result = run(job, "")
    assert [row["part"] for row in result["rows"]] == ["test"]
    assert result["training"]["trained_on"] == result["protocol"]["trained_on"] == "train+valid"
    assert result["protocol"]["hash"] != job.rec.evaluate.protocol.of_run(small_data, "train").hash
    assert result["training"]["epochs"] == 4


def test_validation_items_are_trained_on_only_if_asked(recipe, small_data):
    """The held-out items of one user, in a data set where nobody else has them, gain only by training on them."""
    scores = {}
    for on in ("train", "train+valid"):
        job = load_job(recipe(on.replace("+", "-"), train={"on": on, "epochs": 30, "patience": 30}))
        run(job, "")
        model = open_run(job.run).model
        users, ends = small_data.instances("valid")
        items, lengths = small_data.windows(users, ends, 8)
        with torch.no_grad():
            likelihood = model.log_likelihood(items, lengths, small_data.targets("valid"))
        scores[on] = likelihood.mean().item()
    assert scores["train+valid"] > scores["train"]


def test_folders_that_are_no_finished_run_are_one_clear_line(recipe, tmp_path, small_data):
    with pytest.raises(UserError, match="no run folder of a recommender"):
        open_run(tmp_path / "nothing")
    job = load_job(recipe())
    RunFolder(job.run).claim(job)
    with pytest.raises(UserError, match="is not finished; run 'recalign train"):
        open_run(job.run)
    run(job, "")
    with pytest.raises(UserError, match=r"several recommenders; name one: .*run"):
        open_run(job.run.parent)
    meta = json.loads((small_data.folder / "meta.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(small_data.folder, other)
    (other / "meta.json").write_text(json.dumps({**meta, "content_hash": "0123"}))
    recipe_now = (job.run / "config.yaml").read_text()
    (job.run / "config.yaml").write_text(recipe_now.replace(str(small_data.folder), str(other)))
    with pytest.raises(UserError, match=r"trained on other data .*0123 now"):
        open_run(job.run)


def test_a_recipe_called_config_yaml_is_not_taken_for_a_run(recipe, tmp_path):
    own = recipe().rename(tmp_path / "config.yaml")
    job = load_job(own)
    assert job.run == tmp_path / "run"
    assert load_job(own, [f"run={tmp_path}"]).run == tmp_path
    with pytest.raises(UserError, match="is not a run's"):
        run(load_job(own, [f"run={tmp_path}"]), "")
    with pytest.raises(UserError, match="is no run folder"):
        delete_run(tmp_path)
    run(job, "")
    assert load_job(job.run / "config.yaml").run == job.run


def test_the_last_epoch_is_validated_whatever_the_rhythm(recipe):
    result = run(load_job(recipe(train={"epochs": 3, "evaluate_every": 10})), "")
    assert result["training"]["best_epoch"] == 2


@pytest.mark.parametrize(
    ("rec", "message"),
    [
        ({"grid": {"train.lr": []}}, "grid.train.lr has no values"),
        ({"grid": {"train.lr": [1e-3]}, "train": {"on": "train+valid"}}, "a grid chooses by validation"),
        ({"train": {"prefixes_per_user": 3}}, "SASRec is not trained on prefixes"),
        ({"model": {"name": "LightSANs"}, "train": {"windows": "last"}}, "LightSANs is not trained on windows"),
        ({"model": {"name": "BST"}, "loss": {"negatives": 7}}, "BST has a loss of its own"),
        ({"loss": {"negatives": 3000}}, "negatives is no option of cross-entropy"),
        ({"loss": {"name": "bce", "log_q": True}}, "log_q is no option of bce"),
        ({"loss": {"name": "sampled-softmax", "calibration": 0.5}}, "calibration is no option of sampled-softmax"),
        ({"train": {"seed": -1}}, "seed"),
        ({"evaluate": {"negatives": 1000}}, "evaluate.negatives decides nothing"),
        ({"evaluate": {"repeated_targets": "miss"}}, "evaluate.repeated_targets decides nothing"),
        ({"evaluate": {"candidates": "sampled", "seen": "mask"}}, "evaluate.seen decides nothing"),
    ],
)
def test_an_option_that_would_not_be_used_is_refused(rec, message):
    with pytest.raises(UserError, match=message):
        build(RecConfig, rec)


def test_cutoffs_above_the_catalog_are_known_before_training(recipe):
    with pytest.raises(UserError, match=r"rec.evaluate.cutoffs asks for the best 31 of 30 items"):
        run(load_job(recipe(evaluate={"cutoffs": [10, 31]})), "")


@pytest.mark.parametrize(
    ("key", "value", "own"), [("split", "time", "leave-one-out"), ("trained_on", "train+valid", "train")]
)
def test_a_split_or_part_that_the_run_does_not_have_is_known_before_training(recipe, key, value, own):
    with pytest.raises(UserError, match=rf"rec.evaluate.{key} is {re.escape(value)}, that of this run is {own}"):
        run(load_job(recipe(evaluate={key: value})), "")


@pytest.mark.parametrize("on", ["train", "train+valid"])
def test_too_many_negatives_are_known_before_training(recipe, on):
    job = load_job(recipe(train={"on": on}, evaluate={"candidates": "sampled", "negatives": 29}))
    with pytest.raises(UserError, match="29 negatives cannot be drawn for user number"):
        run(job, "")
    assert not RunFolder(job.run).events("epoch")


def test_targets_that_are_all_cold_are_known_before_training(recipe, small_data, monkeypatch):
    monkeypatch.setattr("rec.evaluation.fit_counts", lambda data, on: torch.zeros(data.n_items + 1, dtype=torch.long))
    with pytest.raises(UserError, match=r"all 40 valid items of .* are cold"):
        run(load_job(recipe(evaluate={"cold_targets": "drop"})), "")


def test_what_was_overwritten_since_is_no_longer_this_run(small_data, tmp_path):
    """The data under the same path prepared anew, or other item vectors in the same file."""
    data, vectors = tmp_path / "data", tmp_path / "vectors.safetensors"
    shutil.copytree(small_data.folder, data)
    items, made = small_data.items["item_id"].to_pylist(), torch.randn(small_data.n_items, 16)
    save_vectors(vectors, items, made, {})
    rec = {**SMALL, "items": {"kind": "vectors", "file": str(vectors)}}
    job = build(RecJob, {"data": str(data), "run": str(tmp_path / "run"), "rec": rec})
    result = run(job, "")
    save_vectors(vectors, items, made + 1, {})
    with pytest.raises(UserError, match="were made anew since it was begun"):
        run(job, "")
    save_vectors(vectors, items, made, {})
    assert run(job, "") == result
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps({**meta, "content_hash": "other"}))
    with pytest.raises(UserError, match="were made anew since it was begun"):
        run(job, "")
    # Killed between training and evaluation: the model that is there must not be tested on what it has learnt.
    for name in ("result.json", "inputs.json"):
        (job.run / name).unlink()
    with pytest.raises(UserError, match="was trained on other data than"):
        run(job, "")


def test_the_time_of_a_run_is_that_of_all_its_attempts(recipe):
    job = load_job(recipe())
    run(job, "")
    (job.run / "result.json").unlink()  # killed between training and evaluation
    epochs = RunFolder(job.run).steps("epoch")
    trained_s = sum(epoch["seconds"] + epoch["evaluation_seconds"] for epoch in epochs)
    assert run(job, "")["wall_s"] >= round(trained_s, 1) > 0  # rounded itself


def test_data_without_validation_needs_another_way_to_stop(recipe, small_data, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(small_data.folder, bare)
    interactions = parquet.read_table(bare / "interactions.parquet")
    part = interactions["part"].to_numpy().copy()
    part[part == 1] = 3
    index = interactions.column_names.index("part")
    parquet.write_table(
        interactions.set_column(index, "part", pa.array(part, interactions["part"].type)), bare / "interactions.parquet"
    )
    job = load_job(recipe(), [f"data={bare}"])
    with pytest.raises(UserError, match="no validation part to stop by"):
        run(job, "")
    result = run(load_job(recipe(), [f"data={bare}", "rec.train.on=train+valid", f"run={tmp_path / 'all'}"]), "")
    assert [row["part"] for row in result["rows"]] == ["test"]


def test_figures_on_validation_items_that_were_trained_on_are_refused(recipe):
    job = load_job(recipe(train={"on": "train+valid", "epochs": 1}))
    run(job, "")
    with pytest.raises(UserError, match="say nothing"):
        evaluate_run(open_run(job.run), {"own": job.rec.evaluate.protocol}, "valid")


def launch(recipe: Path, processes: int, *overrides: str) -> subprocess.Popen:
    root = Path(__file__).parents[2]
    # By a file for DeepSpeed, which a recommender does not use: with --cpu accelerate starts one process, whatever it
    # is asked for.
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(root / "launch/accelerate/cpu.yaml"),
        "--num_processes", str(processes), "--main_process_port", "0",
        "-m", "rec.train", "--config", str(recipe), *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "model",
    [{}, {"name": "BERT4Rec"}, {"name": "LightSANs", "interests": 3}],
    ids=["whole sequences", "masked ones", "prefixes"],
)
def test_two_processes_train_the_same_model_as_one(recipe, model):
    """Without dropout and with the full softmax a step is a function of the global batch alone."""
    losses = {}
    for processes in (1, 2):
        path = recipe(f"ranks-{processes}", model=model, train={"clip_norm": 5.0, "batch_size": 32 if model else 8})
        process = launch(path, processes)
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said
        folder = RunFolder(load_job(path).run)
        losses[processes] = [row["loss"] for row in folder.steps("epoch")]
        assert Checkpoints(folder.path / "checkpoints").newest().world_size == processes
    assert losses[2] == pytest.approx(losses[1], rel=2e-4)
    assert len(losses[2]) == 4


@pytest.mark.distributed
def test_a_rate_that_diverges_ends_on_both_ranks(recipe):
    """One step an epoch: the loss is still a number, the first process alone finds that the scores are not.

    It used to leave the other one waiting for the figures.
    """
    path = recipe("grid", grid={"train.lr": [1e30, 5e-3]}, train={"batch_size": 64})
    process = launch(path, 2)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert RunFolder(load_job(path).run).result()["training"]["grid"]["lr=1e+30"] == 0


@pytest.mark.distributed
def test_a_killed_job_of_two_processes_goes_on_where_it_was(recipe):
    whole, killed = (
        recipe("whole", train={"epochs": 8, "patience": 8}),
        recipe("killed", train={"epochs": 8, "patience": 8}),
    )
    process = launch(whole, 2)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    process = launch(killed, 2)
    folder = RunFolder(load_job(killed).run)
    deadline = time.monotonic() + 120
    while len(folder.events("epoch")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    children = subprocess.run(["pgrep", "-f", str(killed)], capture_output=True, text=True).stdout.split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    process.wait(timeout=900)
    assert folder.result() is None
    process = launch(killed, 2)
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    assert [row["step"] for row in folder.events("epoch")].count(0) == 1  # it went on, and did not start over
    one, other = (open_run(load_job(path).run).model.state_dict() for path in (whole, killed))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
