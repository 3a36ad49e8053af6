"""The main job for real, on a tiny world: vLLM, two DeepSpeed ranks, a separate generator, and kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file
from tiny_job import (
    BATCH,
    RECIPE,
    ROOT,
    STEPS,
    assert_dead,
    assert_no_sample_lost_or_repeated,
    before_alignment,
    final_weights,
    finish,
    start,
    wait_until,
)

from align.config import Stages, load_job
from align.order import set_aside
from align.samples import SampleLog
from align.snapshots import SnapshotStore
from launch.cluster.rates import measured
from launch.cluster.simulate import Simulation
from llm.config import EncoderConfig
from llm.text_encoder import TextEncoder
from rec.data.prepared import Prepared
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.runfolder import CONFIG, RunFolder
from rec.runtime.stopping import STOP

pytestmark = [pytest.mark.distributed, pytest.mark.vllm]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_data: Prepared) -> RunFolder:
    """An undisturbed run."""
    run = tmp_path_factory.mktemp("main") / "run"
    run.mkdir()
    (run / CONFIG).write_text(yaml.safe_dump({"data": str(small_data.folder), "run": str(run), **RECIPE}))
    # The resolved recipe is what a run folder holds.
    recipe = run.parent / "recipe.yaml"
    (run / CONFIG).rename(recipe)
    command = [sys.executable, "-m", "launch.cli", "align", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Base+SeRALM" in done.stdout
    said, folder = " ".join(done.stdout.split()), RunFolder(run)
    figures, told = folder.result()["asynchronous"], folder.result()["texts"]
    assert f"{figures['empty_texts']} of {figures['texts_generated']} texts empty" in said
    assert f"{told['items_without_text']} of 30 items have no text; of the catalog's 60 texts" in said
    return folder


def start_replay(run: Path, *more: str, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "launch.cli", "align", "--replay", str(run), *more]
    return subprocess.Popen(command, cwd=ROOT, **options)


def start_trainer(run: RunFolder, folder: Path, *overrides: str, ranks: int = 2) -> subprocess.Popen:
    """Train again from the recorded samples alone, as a cluster user would."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml",
        "--num_processes", str(ranks), "--main_process_port", "29655",
        "-m", "align.trainer", "--config", str(run.path / CONFIG), "--replay-into", str(folder / "replay"), *overrides,
    ]  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def replay_of(run: RunFolder, folder: Path, *overrides: str, ranks: int = 2) -> RunFolder:
    process = start_trainer(run, folder, *overrides, ranks=ranks)
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0, said[-3000:]
    return RunFolder(folder / "replay")


def assert_equals_its_own_replay(run: RunFolder, folder: Path) -> None:
    command = [sys.executable, "-m", "launch.cli", "align", "--replay", str(run.path), "--out", str(folder / "again")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "a replay ends with the same weights: yes (no tensor differs)" in done.stdout
    [claim] = RunFolder(folder / "again").result()["claims"]
    assert claim["holds"] is True
    # The command's word is not all there is.
    trained, replayed = final_weights(run), final_weights(RunFolder(folder / "again"))
    assert all(torch.equal(value, replayed[name]) for name, value in trained.items())


def test_an_undisturbed_run_is_what_the_paper_describes(finished):
    result = finished.result()
    figures = result["asynchronous"]
    assert 0 <= figures["lag_in_queue_mean"] <= figures["lag_steps_mean"]
    parts = [figures[f"{part}_s_mean"] for part in ("gather", "write", "hash")]
    assert sum(parts) == pytest.approx(figures["publish_s_mean"], abs=1e-3)
    assert min(parts) > 0
    assert [row["method"] for row in result["rows"]][:2] == ["Base", "Base+NA_LLM"]
    assert result["rows"][-1]["method"] == "Base+SeRALM"
    assert all(0 <= row["HR@10"] <= 1 and row["HR@10_se"] > 0 for row in result["rows"])
    # The last two, and every twelfth for good.
    assert [found.step for found in Checkpoints(finished.path / "checkpoints").examine()] == [40, 39, 36, 24, 12]
    assert figures["engine"] == "DeepSpeedEngine"
    assert figures["zero_stage"] == 2
    assert figures["trainer_ranks"] == 2
    assert figures["snapshots_published"] >= 4
    assert figures["snapshots_loaded"] >= 4
    assert figures["versions_consumed"] >= 4
    assert figures["lag_steps_max"] <= RECIPE["align"]["max_lag_steps"]
    assert figures["canary_max_difference"] < 1e-3
    trainers = {row["pid"] for row in finished.events("train")}
    generators = {row["pid"] for row in finished.events("generated")}
    assert len(generators) == 1
    assert not trainers & generators
    for row in finished.events("refresh"):
        assert row["canary_max_difference"] < 1e-3
    assert {path.name for path in (finished.path / "plots").iterdir()} == {"alignment.png", "training.png"}
    assert_no_sample_lost_or_repeated(finished)


def test_the_simulation_predicts_how_long_a_measured_run_took(finished):
    """From how long each thing took and the rules of waiting alone, how long all of it took, and how stale it was."""
    align = load_job(finished.path / CONFIG).align
    found = Simulation(align, measured(finished), align.generator.processes).run()
    refreshed, train = finished.events("refresh")[0], finished.steps("train")
    begin = refreshed["time_s"] - refreshed["load_s"] - refreshed["canary_s"]
    assert found.wall_s == pytest.approx(finished.steps("saved")[-1]["time_s"] - begin, rel=0.2)
    lag = sum(row["lag_steps_mean"] for row in train) / len(train)
    assert found.lag_steps_mean == pytest.approx(lag, abs=1.5)
    assert found.lag_steps_max <= align.max_lag_steps


def test_every_text_that_says_nothing_or_was_cut_is_counted(finished):
    log, told = SampleLog(Stages(finished.path).samples), finished.result()["texts"]
    texts = {text.seed: text for step in range(STEPS) for one in log.read(step) for draw in one.draws for text in draw}
    assert finished.result()["asynchronous"]["empty_texts"] == sum(not text.text for text in texts.values())
    longest = RECIPE["llm"]["knowledge"]["max_new_tokens"]
    assert (
        0
        < sum(row["cut_texts"] for row in finished.events("generated"))
        <= sum(len(text.token_ids) == longest for text in texts.values())
    )
    assert told["items_without_text"] == 0
    for name, path in (("not_aligned", "not-aligned"), ("aligned", "aligned")):
        table = parquet.read_table(finished.path / "knowledge" / f"{path}.parquet")
        empty = sum(not text for text in table["text"].to_pylist())
        assert told[name] == {"rows": 60, "empty": empty, "cut": sum(table["cut"].to_pylist())}
    case = finished.result()["case_study"]
    before = parquet.read_table(finished.path / "knowledge" / "not-aligned.parquet")["text"].to_pylist()
    assert len(case["target_texts"]) == 2
    assert case["target_texts"][0] in before


def test_users_set_aside_reward_and_fit_no_recommender(finished, small_data):
    aside = set_aside(small_data, 0.25, seed=42)
    log, stages = SampleLog(Stages(finished.path).samples), Stages(finished.path)
    for sample in (sample for step in range(STEPS) for sample in log.read(step)):
        assert sample.rewards is not sample.fits
        assert sample.rewards == bool(aside[sample.user])
        assert not {other.place for other in sample.others} & set(sample.places)
    assert all(0 <= row["said_kind"] <= 1 for row in finished.steps("train"))
    for folder in stages.aligning(load_job(finished.path / CONFIG).align):
        assert folder.parent == stages.without_reward_users
        assert json.loads((folder / "temperature.json").read_text())["temperature"] > 0


def test_alignment_moves_the_llm_and_the_recommender(finished):
    stages = Stages(finished.path)
    final = final_weights(finished)
    original = load_file(stages.llm / "model" / "model.safetensors")
    assert any(not torch.equal(value, final[f"llm.{name}"]) for name, value in original.items())
    not_aligned = load_file(stages.na / "model" / "model.safetensors")
    assert any(not torch.equal(value, final[f"rec.{name}"]) for name, value in not_aligned.items())


def test_zero_three_trains_the_same_models_from_the_same_samples(finished, tmp_path):
    """Stage 3 shards the LLM and its reference, and must leave the text encoder and the snapshots whole."""
    replay = replay_of(finished, tmp_path, "align.trainer.zero_stage=3")
    assert replay.events("trainer_started")[-1]["zero_stage"] == 3
    two, three = final_weights(finished), final_weights(replay)
    assert set(two) == set(three)
    for name, value in two.items():
        close = {"rtol": 0.02, "atol": 0.02} if name.startswith("llm.") else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(three[name], value, **close, msg=lambda m, n=name: f"{n}: {m}")


def test_a_trainer_of_two_ranks_is_stopped_and_one_goes_on_with_the_same_samples(finished, tmp_path):
    process = start_trainer(finished, tmp_path)
    folder = RunFolder(tmp_path / "replay")
    wait_until(lambda: len(folder.steps("train")) > 5, process)
    (folder.path / STOP).touch()
    _, said = process.communicate(timeout=900)
    assert process.returncode == 0
    assert "STOP asks for it: stopped after step" in said
    (folder.path / STOP).unlink()
    stopped_at = len(folder.events("train"))
    assert Checkpoints(folder.path / "checkpoints").newest().step == stopped_at < STEPS

    replay_of(finished, tmp_path, "align.trainer.processes=1", ranks=1)
    assert [row["world_size"] for row in folder.events("trainer_started")] == [2, 1]
    ours, theirs = folder.steps("train"), finished.steps("train")
    # What is known of the samples alone is the same at every step; nothing was done twice.
    assert [row["reward"].hex() for row in ours] == [row["reward"].hex() for row in theirs]
    assert len(folder.events("train")) == STEPS
    assert [row["kl"].hex() for row in ours[:stopped_at]] == [row["kl"].hex() for row in theirs[:stopped_at]]
    # The same texts, histories and weights as one rank's as they were as two ranks'.
    for name in ("policy_loss", "kl", "text_logprob", "reward_drift"):
        assert ours[stopped_at][name] == pytest.approx(theirs[stopped_at][name], rel=1e-3, abs=1e-6)
    for name, value in final_weights(folder).items():
        torch.testing.assert_close(value, final_weights(finished)[name], rtol=0.02, atol=0.02)


def test_a_replay_of_other_samples_ends_elsewhere_and_says_so(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    log = SampleLog(Stages(run).samples)
    changed = [replace(sample, log_p_y_given_xs=[value + 2 for value in sample.log_p_y_given_xs])
               if sample.ordinal % (2 * BATCH) == 0 else sample for sample in log.read(STEPS - 1)]  # fmt: skip
    log.path_of(STEPS - 1).unlink()
    log.append(STEPS - 1, changed)
    assert start_replay(run).wait(300) == 1
    [claim] = RunFolder(run / "replay").result()["claims"]
    assert claim["holds"] is False
    assert "llm/" in claim["figure"]


def test_a_replay_needs_a_finished_run_and_nothing_else(finished, tmp_path):
    run = before_alignment(finished, tmp_path)
    for arguments, message in (
        ([run.path], "is not finished: it needs all 40 steps"),
        ([tmp_path / "none"], "is no run folder"),
        ([finished.path, "align.trainer.lr=1"], "without a recipe or overrides"),
        ([finished.path, "--out", finished.path, "--fresh"], "is the run that is replayed"),
    ):
        process = start_replay(*arguments, stderr=subprocess.PIPE)
        assert message in process.communicate(timeout=900)[1].decode()
        assert process.returncode == 2


def test_a_catalog_is_written_and_encoded_once_from_a_finished_run(finished, tmp_path):
    def knowledge(*more: str) -> str:
        command = [sys.executable, "-m", "launch.cli", "knowledge", str(finished.path), "--out", str(out), *more]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    out = tmp_path / "knowledge.parquet"
    said = knowledge()
    assert "30 items, 60 texts" in said
    assert "60 texts encoded, 0 kept" in said
    first = parquet.read_table(out)
    assert len(first["vector"][0]) == RECIPE["llm"]["lmrec"]["dim"]
    encoder = TextEncoder(Stages(finished.path).llm / "model", EncoderConfig())
    torch.testing.assert_close(torch.tensor(first["vector"].to_pylist()), encoder(first["text"].to_pylist()))
    assert "0 texts encoded, 60 kept" in knowledge()
    assert parquet.read_table(out).equals(first)
    original = knowledge("--original")
    assert "60 texts encoded, 0 kept" in original
    assert set(parquet.read_table(out)["version"].to_pylist()) == {"original"}


def test_latency_of_a_finished_run(finished, tmp_path):
    command = [sys.executable, "-m", "launch.cli", "bench", "latency", str(finished.path), "--requests", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = RunFolder(finished.path / "latency").result()["rows"]
    assert [row["what"].split(":")[0] for row in rows] == ["SASRec, IDs alone", "SeRALM_rec", "SeRALM_gen&enc"]
    assert all(0 < row["median_s"] <= row["p95_s"] for row in rows)
    assert rows[2]["median_s"] > rows[1]["median_s"]


def test_a_finished_run_says_so_and_another_recipe_is_refused(finished):
    log = finished.path.parent / "run.log"
    assert "is finished" in finish(finished.path, start(finished.path))
    assert start(finished.path, "rec.train.lr=0.5").wait(60) == 2
    assert log.read_text().strip().splitlines()[-1].startswith("error: ")
    assert "rec.train.lr: 0.005 there, 0.5 now" in log.read_text()


def test_kill_nine_of_generator_rank_and_everything_changes_nothing(finished, tmp_path):
    """One run that is stopped, loses its generator, then a trainer rank, then everything, and goes on each time."""
    run = before_alignment(finished, tmp_path)
    process = start(run.path)
    wait_until(lambda: len(run.steps("train")) > 2, process)
    (run.path / STOP).touch()
    assert "STOP asks for it: stopped in alignment" in finish(run.path, process)
    assert run.result() is None
    # What was done is saved, and no step is done twice.
    assert Checkpoints(run.path / "checkpoints").newest().step == len(run.events("train"))
    (run.path / STOP).unlink()

    begun, written = len(run.steps("train")), len(run.events("generated"))
    process = start(run.path)
    wait_until(lambda: len(run.steps("train")) > begun + 2 and len(run.events("generated")) > written, process)
    os.kill(run.events("generated")[-1]["pid"], signal.SIGKILL)
    wait_until(lambda: len(run.steps("train")) > begun + 8, process)
    os.kill(run.events("train")[-1]["pid"], signal.SIGKILL)
    wait_until(lambda: len(run.steps("train")) > begun + 16, process)
    assert {row["job"] for row in run.events("restarted")} == {"generator", "trainer"}

    jobs = {row["pid"] for row in run.events() if row["event"] in ("train", "generated")}
    process.kill()
    process.wait()
    assert_dead(jobs)
    assert Checkpoints(run.path / "checkpoints").newest().step >= begun + 12
    # The disk has rotted below what the generator would need: the trainer has to publish again, whatever its step.
    for weights in (run.path / "snapshots").glob("v*/recommender/model.safetensors"):
        weights.write_bytes(b"rotten")
    # What a kill in the middle of a publication leaves behind.
    broken = run.path / "snapshots" / "v000099"
    (broken / "llm").mkdir(parents=True)
    (broken / "llm" / "model.safetensors").write_bytes(b"half")

    text = finish(run.path, start(run.path))
    assert "Base+SeRALM" in text
    assert "ignoring incomplete snapshot" in text + (run.path / "logs" / "generator.log").read_text()
    assert_no_sample_lost_or_repeated(run)
    assert_equals_its_own_replay(run, tmp_path)
    assert json.loads((run.path / "result.json").read_text())["asynchronous"]["steps"] == STEPS


@pytest.mark.slow
def test_weights_that_lie_in_no_file_survive_kill_nine_of_either_side(finished, tmp_path):
    run = before_alignment(finished, tmp_path)
    process = start(run.path, "align.weights=gloo")
    wait_until(lambda: len(run.steps("train")) > 6, process)
    os.kill(run.events("generated")[-1]["pid"], signal.SIGKILL)  # its successor has to ask again
    wait_until(lambda: len(run.steps("train")) > 16, process)
    os.kill(run.events("train")[-1]["pid"], signal.SIGKILL)  # and with it all that generators could ask for
    finish(run.path, process)
    assert {row["job"] for row in run.events("restarted")} == {"generator", "trainer"}
    assert_no_sample_lost_or_repeated(run)
    assert_equals_its_own_replay(run, tmp_path)
    snapshots = SnapshotStore(Stages(run.path).snapshots)
    assert [snapshots.get(version).whole for version in snapshots.versions()] == [True, False, False, False]
    assert {row["version"] for row in run.events("given")} >= {0, 7}
    assert max(row["canary_max_difference"] for row in run.events("refresh")) < 1e-4
