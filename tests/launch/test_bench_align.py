"""`recalign bench align` for real, on the tiny job: every mode is measured once, its rates are those of its log."""

import subprocess
import sys

import pytest
import yaml
from tiny_job import BATCH, RECIPE, ROOT

from align.figures import saving_seconds
from rec.runtime.runfolder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.vllm]

STEPS = 12
MODES = ("synchronous", "asynchronous", "trainer alone", "generator alone")


def test_every_mode_is_measured_once(small_data, tmp_path):
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "bench"
    recipe.write_text(yaml.safe_dump({"data": str(small_data.folder), "run": str(tmp_path / "run"), **RECIPE}))
    command = [
        sys.executable, "-m", "launch.cli", "bench", "align", str(recipe), "--steps", str(STEPS), "--out", str(out),
    ]  # fmt: skip

    def measure() -> dict:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stdout + done.stderr[-3000:]
        assert "tokens a second: drawn" in done.stdout
        return RunFolder(out).result()

    result = measure()
    rates = {row["mode"]: row["samples_per_s"] for row in result["rows"]}
    assert tuple(rates) == MODES
    assert all(rate > 0 for rate in rates.values())
    share, offline = (claim["figure"] for claim in result["claims"])
    assert share == pytest.approx(
        rates["asynchronous"] / min(rates["trainer alone"], rates["generator alone"]), rel=1e-2
    )
    tokens = result["tokens_per_s"]
    assert offline == pytest.approx(tokens["drawn"] / tokens["vLLM offline"], rel=1e-2)
    assert tokens["drawn"] > tokens["scored and written too"] > 0

    rows = RunFolder(out / "synchronous").steps("train")
    assert max(row["lag_steps"] for row in rows) == 0
    assert len(rows) == STEPS
    saving = saving_seconds(RunFolder(out / "synchronous"))
    seconds = sum(row["busy_s"] + row["waited_s"] + saving[row["step"]] for row in rows[1:])
    assert rates["synchronous"] == pytest.approx(2 * BATCH * (STEPS - 1) / seconds, rel=1e-2)
    # The trainer alone had all samples before it began, the generator alone one snapshot and no bound to wait for.
    assert max(row["waited_s"] for row in RunFolder(out / "trainer-alone").steps("train")) < 0.1
    generated = RunFolder(out / "generator-alone").steps("generated")
    assert len({row["version"] for row in generated}) == 1
    assert sum(row["batches"] for row in generated) == STEPS
    assert {row["mode"]: row["samples_per_s"] for row in measure()["rows"]} == rates
    for changed, refused in (
        (["align.trainer.processes=2"], "another recipe (job.align.trainer.processes: "),
        (["align.others=stored", "align.generator.processes=2"], "measures one generator"),
    ):
        done = subprocess.run([*command, *changed], cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 2
        assert refused in done.stderr
