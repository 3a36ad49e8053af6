"""``recalign pretrain`` of a RECFORMER: watched, started again when it dies, its mistakes in one line."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "llm" / "recformer"))
from backbones import save_bert
from tiny_recformer import assert_same_bits, finish, weights, write_recipe

from launch import cli
from launch.bench import recformer as bench
from rec.runtime.runfolder import RunFolder

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert") / "model", dropout=0.1)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_job_that_is_killed_is_started_again_and_ends_as_if_nothing_had_been(backbone, small_data, tmp_path):
    recipes = {}
    for name in ("watched", "alone"):
        (tmp_path / name).mkdir()
        recipes[name] = write_recipe(tmp_path / name, small_data.folder, backbone, finetune=None)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "launch.cli", "pretrain", str(recipes["watched"])]
    log = (tmp_path / "log").open("ab")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    folder = RunFolder(tmp_path / "watched" / "run")
    end = time.monotonic() + 200
    while len(rows := folder.events("pt_step")) < 5:
        assert process.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(rows[-1]["pid"], signal.SIGKILL)
    assert process.wait(300) == 0, (tmp_path / "log").read_text()
    assert [row["exit_code"] for row in folder.events("restarted")] == [-signal.SIGKILL]
    assert "best in-batch accuracy" in (tmp_path / "log").read_text()
    finish(recipes["alone"], "pretrain")
    models = [weights(tmp_path / name / "run" / "pretrain" / "model") for name in recipes]
    assert_same_bits(*models)
    assert folder.result()["speed"]["pt"]["tokens"] > 0


def test_a_mistake_in_a_recipe_is_one_line(backbone, small_data, tmp_path, capsys, monkeypatch):
    recipe = write_recipe(tmp_path, small_data.folder, backbone)
    content = yaml.safe_load(recipe.read_text())
    for change, expected in (
        (["llm.recformer.pretrain.lrr=1"], "unknown key 'lrr' in llm.recformer.pretrain"),
        (["llm.recformer.pretrain=null", "llm.recformer.finetune=null"], "neither a pretrain nor a finetune section"),
        (["llm.recformer.processes=3"], "pretrain.batch_size 8 is no multiple of processes 3"),
    ):
        monkeypatch.setattr(sys, "argv", ["recalign", "pretrain", str(recipe), *change])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        assert expected in capsys.readouterr().err
    assert content["llm"]["recformer"]


@pytest.mark.slow
def test_the_bench_measures_the_same_batches_four_ways(backbone, small_data, tmp_path):
    recipe = write_recipe(tmp_path, small_data.folder, backbone)
    result = bench.run(recipe, ["llm.recformer.pretrain.precision=fp32"], 2, 2, tmp_path / "bench", "test")
    rows = {row["way"]: row for row in result["rows"]}
    assert list(rows) == list(bench.WAYS)
    assert {row["steps"] for row in rows.values()} == {4}
    assert rows["recalign"]["places_per_token"] < rows[bench.OFFICIAL]["places_per_token"] / 1.5
    assert rows["by length alone"]["places_per_token"] == pytest.approx(
        2 * rows["recalign"]["places_per_token"], abs=2e-3
    )
    rate = rows["recalign"]["tokens_per_s"] / rows[bench.OFFICIAL]["tokens_per_s"]
    assert result["claims"][0]["figure"] == pytest.approx(rate, abs=1e-2)
