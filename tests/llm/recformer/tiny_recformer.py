"""A tiny RECFORMER job that is started, killed and looked at."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from rec.runtime.runfolder import RunFolder

ROOT = Path(__file__).parents[3]
RECFORMER: dict[str, Any] = {
    "text": {"attributes": ["title", "kind"]},
    "size": {"max_items": 6, "max_tokens": 48},
    "pretrain": {
        "batch_size": 8, "epochs": 6, "lr": 3e-3, "part_tokens": 128, "recompute": True, "evaluate_every": 7,
        "checkpoint_every": 3,
    },
    "finetune": {
        "batch_size": 8, "epochs": 4, "fixed_epochs": 3, "lr": 3e-3, "warmup_steps": 3, "part_tokens": 128,
        "evaluate_every": 2, "checkpoint_every": 3, "evaluate": {"cutoffs": [5, 10]},
        "protocols": ["elephant-full"],
    },
}  # fmt: skip


def write_recipe(folder: Path, data: Path, backbone: Path, **more: Any) -> Path:
    """A recipe whose run folder is ``folder / "run"``; ``more`` overrides keys of ``llm.recformer``."""
    recformer = {**RECFORMER, "backbone": str(backbone)}
    for key, value in more.items():
        recformer[key] = {**recformer.get(key, {}), **value} if isinstance(value, dict) else value
    recipe = folder / "recipe.yaml"
    content = {"data": str(data), "run": str(folder / "run"), "llm": {"recformer": recformer}}
    recipe.write_text(yaml.safe_dump(content))
    return recipe


def start(recipe: Path, stage: str, processes: int = 1, deepspeed: bool = False) -> subprocess.Popen:
    """The stage under accelerate launch, its output in a log beside the recipe."""
    plain = ["--cpu", "--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1"]
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        # Of several processes, accelerate's own --cpu would start one; the recipe says whether DeepSpeed is used.
        *(["--config_file", "launch/accelerate/cpu.yaml"] if deepspeed or processes > 1 else plain),
        "--num_processes", str(processes), *(["--main_process_port", "0"] if processes > 1 else []),
        "-m", f"llm.recformer.{stage}", "--config", str(recipe),
    ]  # fmt: skip
    return popen(command, recipe.parent / f"{stage}.log")


def popen(command: list[str], log: Path) -> subprocess.Popen:
    """A process group of its own on the CPU, one thread a process."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(recipe: Path, stage: str, processes: int = 1, deepspeed: bool = False) -> None:
    """Run the stage to its end."""
    code = start(recipe, stage, processes, deepspeed).wait(400)
    assert code == 0, (recipe.parent / f"{stage}.log").read_text()[-4000:]


def kill_once_at(recipe: Path, stage: str, checkpoint: Path, processes: int = 1, deepspeed: bool = False) -> None:
    """Start the stage, and kill its first rank as soon as ``checkpoint`` is there; whoever started it ends the rest."""
    process = start(recipe, stage, processes, deepspeed)
    end = time.monotonic() + 300
    while not checkpoint.exists():
        assert process.poll() is None, (recipe.parent / f"{stage}.log").read_text()[-4000:]
        assert time.monotonic() < end
        time.sleep(0.005)
    os.kill(RunFolder(recipe.parent / "run").events()[-1]["pid"], signal.SIGKILL)
    assert process.wait(120) != 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
