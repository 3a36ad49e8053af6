"""A run goes on with another number of ranks: the same weights, optimizer states and samples."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_policy import LORA, LR, ROOT, llama, make_sample, model  # noqa: F401 - fixtures

from align.samples import SampleLog

TEXTS = [([[5, 6], [7]], [[[8, 9, 1], [10 + nth]], [[8, 9, 1], [2, 2]]]) for nth in range(6)]


def launch(out: Path, original: Path, phase: str, processes: int, port: int, **trainer: object) -> dict:
    """Run one phase; the weights that it kept, by name."""
    settings = {"processes": processes, "batch_size": 6, "lr": LR, "warmup_steps": 0, **trainer}
    recipe = out / f"{phase}.yaml"
    align = {"trainer": settings, "objective": {"samples": 2}, "wait_timeout_s": 120}
    recipe.write_text(yaml.safe_dump({"data": "none", "run": str(out), "align": align}))
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml",
        "--num_processes", str(processes), "--main_process_port", str(port),
        "tests/align/world_steps.py", str(recipe), str(original), str(out), phase,
    ]  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem.removeprefix(f"{phase}-"): load_file(path) for path in out.glob(f"{phase}-*.safetensors")}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "adapters"),
    [(3, False), *(pytest.param(2, own, marks=pytest.mark.slow) for own in (False, True))],
)
def test_two_ranks_save_and_one_or_three_go_on(tmp_path, request, stage, adapters):
    original = request.getfixturevalue("llama" if adapters else "model")
    SampleLog(tmp_path / "samples").append(0, [make_sample(nth, *texts) for nth, texts in enumerate(TEXTS)])
    more = {"zero_stage": stage, **({"lora": LORA} if adapters else {})}
    saved = launch(tmp_path, original, "save", 2, 29640, **more)
    for processes in (1, 3):
        found = launch(tmp_path, original, f"load{processes}", processes, 29640 + processes, **more)
        assert all(torch.equal(value, found["two-steps"][name]) for name, value in saved["two-steps"].items())
        # The same six samples, divided otherwise: sums are taken in another order.
        for name, value in saved["three-steps"].items():
            torch.testing.assert_close(found["three-steps"][name], value, rtol=1e-3, atol=2e-5)
        assert all(torch.equal(value, found["restored"][name]) for name, value in found["three-steps"].items())
    assert any(not torch.equal(value, saved["three-steps"][name]) for name, value in saved["two-steps"].items())
