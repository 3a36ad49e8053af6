"""A tiny LMRec job that is started under ``accelerate launch``, killed and looked at."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from llm.lmrec_job import LMRecJob
from rec.data.prepared import Prepared
from rec.runtime.config import build

ROOT = Path(__file__).parents[2]
STEPS = 12
LLM = {
    "lmrec": {"vocabulary": 400, "context": 48, "dim": 32, "layers": 2, "heads": 2},
    # Without standardising, whose statistics are each rank's own, two ranks are one process.
    "recommend": {
        "pairs": 16, "prefixes": 2, "negatives": 8, "recommendation_weight": 0.02, "micro_histories": 2,
        "standardise": False,
    },
    "train": {
        "steps": STEPS, "rows": 8, "micro_rows": 2, "lr": 5e-3, "validate_every": 3, "validation_users": 15,
        "checkpoint_every": 4, "precision": "fp32", "clip_norm": 0.5,
    },
}  # fmt: skip


def recipe(folder: Path, data: Path, **train: object) -> Path:
    """Write the job's recipe; its run folder is ``folder``/run."""
    llm = {**LLM, "train": {**LLM["train"], **train}}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data": str(data), "run": str(folder / "run"), "llm": llm}))
    return path


def job(folder: Path, data: Prepared, **llm: object) -> LMRecJob:
    """The same job for one plain process, with other sections of ``llm``; its run folder is ``folder``/run."""
    content = {"data": str(data.folder), "run": str(folder / "run"), "llm": {**LLM, **llm}}
    content["llm"]["train"] = {**LLM["train"], "zero_stage": 0, **llm.get("train", {})}
    return build(LMRecJob, content)


def start(path: Path, *overrides: str, ranks: int = 2, port: int = 29700, script: str = "") -> subprocess.Popen:
    """The job on ``ranks`` processes of DeepSpeed; ``script`` is run instead of the module if it is given."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml",
        "--num_processes", str(ranks), "--main_process_port", str(port),
        *([script] if script else ["-m", "llm.pretrain"]), "--config", str(path), *overrides,
    ]  # fmt: skip
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    log = (path.parent / "log.txt").open("ab")
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )


def finish(path: Path, process: subprocess.Popen) -> str:
    code = process.wait(300)
    text = (path.parent / "log.txt").read_text()
    assert code == 0, text[-4000:]
    return text


def final(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors") | load_file(run / "heads.safetensors")
