"""The house rules that a machine can check."""

import argparse
import ast
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from align.config import MainJob, TrainerConfig, load_job
from align.policy import deepspeed_config
from llm.lmrec_job import LMRecJob
from llm.probe_job import ProbeJob
from llm.recformer.job import RecformerJob
from rec.job import RecJob
from rec.runtime import config

ROOT = Path(__file__).parents[1]
ORDER = ["rec", "llm", "align", "launch"]
FILES = [path for package in ORDER for path in sorted((ROOT / package).rglob("*.py"))]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 62
UNKNOWN_TO_REC = {"transformers", "vllm", "deepspeed"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_every_name_of_torch_cuda_is_one():
    """No machine without a GPU would find out."""
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
                assert hasattr(torch.cuda, node.attr), f"{path}:{node.lineno}: torch.cuda.{node.attr}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    above = set(ORDER[ORDER.index(package) + 1 :])
    assert not imported(path) & above
    if package == "rec":
        assert not imported(path) & UNKNOWN_TO_REC


def test_every_folder_with_code_is_installed():
    """A checkout has them all; a wheel has those that are named."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    assert {".".join(path.relative_to(ROOT).parent.parts) for path in FILES} <= set(named)


def test_one_file_touches_vllm():
    assert [path.relative_to(ROOT).as_posix() for path in FILES if "vllm" in imported(path)] == ["llm/engine.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small_and_documented(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    tree = ast.parse(text)
    assert path.name == "__init__.py" or ast.get_docstring(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, node.name


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_loads_and_begins_with_its_command(path):
    content = config.read_recipe(path)
    kind, llm = MainJob if "align" in content else RecJob, content.get("llm", {})
    if kind is RecJob and llm:
        kind = RecformerJob if "recformer" in llm else ProbeJob if "probe" in llm else LMRecJob
    job = config.load(kind, path)
    assert config.load(kind, path) == job
    head = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert head.startswith("# ")
    assert "recalign " in head


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_every_deepspeed_file_says_what_must_be_explicit(path):
    content = json.loads(path.read_text())
    assert content["zero_optimization"]["stage"] == int(path.stem.split("_")[0].removeprefix("zero"))
    assert next(iter(content)) == "_comment"
    assert f"align.trainer.zero_stage={content['zero_optimization']['stage']}" in content["_comment"]
    for key in ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "bf16"):
        assert key in content


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "accelerate").glob("*.yaml")), ids=lambda path: path.name)
def test_every_accelerate_file_starts_deepspeed_and_with_its_command(path):
    text = path.read_text(encoding="utf-8")
    assert f"accelerate launch --config_file launch/accelerate/{path.name}" in text.split("compute_environment")[0]
    content = yaml.safe_load(text)
    assert content["distributed_type"] == "DEEPSPEED"
    assert content["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"
    # The recipe decides them: said twice they could differ.
    assert not content["deepspeed_config"].keys() & {"zero_stage", "deepspeed_config_file", "gradient_clipping"}


def started_by(command: str, folder: Path) -> tuple[argparse.Namespace, MainJob]:
    """What accelerate's launcher makes of a documented command, and the recipe that its ranks would read."""
    values = {"RUN": str(folder), "N": "2", "RANK": "1", "HEAD": "10.0.0.1", "((8 * N))": "16"}
    command = re.sub(r"\$(\(\(8 \* N\)\)|\w+)|\bRUN\b", lambda found: values[found[1] or found[0]], command)
    words = shlex.split(command)
    begin = words.index("launch") + 1
    arguments = launch_command_parser().parse_args(words[begin:])
    _validate_launch_command(arguments)
    assert arguments.training_script == "align.trainer"
    assert arguments.module
    assert arguments.training_script_args[0] == "--config"
    (folder / "config.yaml").write_text(f"data: x\nrun: {folder}\n")
    return arguments, load_job(Path(arguments.training_script_args[1]), arguments.training_script_args[2:])


STAGES = ((1, False), (2, False), (3, False), (3, True))


@pytest.mark.parametrize(("stage", "offload"), STAGES)
@pytest.mark.parametrize("name", ["cpu", "gpu", "multi-node"])
def test_the_command_of_every_accelerate_file_starts_every_zero_stage(tmp_path, name, stage, offload):
    text = (ROOT / "launch" / "accelerate" / f"{name}.yaml").read_text()
    lines = [
        line.removeprefix("#").strip().removesuffix("\\") for line in text.partition("# The ZeRO stage")[0].splitlines()
    ]
    command = " ".join(lines[next(nth for nth, line in enumerate(lines) if "accelerate launch" in line) :])
    given = f"{command} align.trainer.zero_stage={stage} align.trainer.offload={str(offload).lower()}"
    arguments, job = started_by(given, tmp_path)
    assert arguments.use_deepspeed
    assert arguments.deepspeed_multinode_launcher == "standard"
    assert arguments.num_machines == (2 if name == "multi-node" else 1)
    assert deepspeed_config(job.align.trainer)["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda path: path.name)
def test_the_command_of_every_deepspeed_file_uses_it(tmp_path, path):
    content = json.loads(path.read_text())
    arguments, job = started_by(content["_comment"], tmp_path)
    assert arguments.num_processes == job.align.trainer.processes == 2
    assert deepspeed_config(job.align.trainer)["zero_optimization"] == content["zero_optimization"]


def test_every_way_to_shard_has_its_deepspeed_file():
    names = {path.stem for path in (ROOT / "ds_configs").glob("*.json")}
    assert names == {"zero1", "zero2", "zero3", "zero3_offload"}
    for stage, offload in STAGES:
        content = deepspeed_config(TrainerConfig(zero_stage=stage, offload=offload, clip_norm=0.5))
        assert content["zero_optimization"]["stage"] == stage
        assert ("offload_optimizer" in content["zero_optimization"]) == offload
        assert content["gradient_clipping"] == 0.5
