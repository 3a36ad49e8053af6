"""The real DeepSpeed on two real ranks against plain torch on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from align.config import ObjectiveConfig, TrainerConfig
from align.objective import policy_loss
from align.policy import deepspeed_config, token_logprobs
from align.samples import Sample, SampleLog
from llm.config import LMRecConfig
from llm.lmrec import build_lmrec

ROOT = Path(__file__).parents[2]
ALPHA, LR, CLIP = 0.3, 1e-2, 0.5
WEIGHTS = [0.5, -1.0, 2.0, 3.0]
# Two samples with two texts, one with one, one whose text is only the end of sequence.
TEXTS = [
    ([[5, 6], [7]], [[8, 9, 1], [10]]),
    ([[11]], [[12, 13]]),
    ([[5, 6, 7], [9, 8]], [[3], [4, 4, 4, 1]]),
    ([[20]], [[1]]),
]


def make_sample(ordinal: int, prompts: list[list[int]], token_ids: list[list[int]]) -> Sample:
    texts, logprobs = [""] * len(token_ids), [[-1.0] * len(text) for text in token_ids]
    fresh_items = [1] * len(prompts)
    return Sample(ordinal, 0, [1], 1, fresh_items, prompts, token_ids, logprobs, texts, 0.0, 0.0, 0, 0)


def samples() -> list[Sample]:
    return [make_sample(ordinal, *texts) for ordinal, texts in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "model"
    torch.manual_seed(0)
    build_lmrec(LMRecConfig(dim=32, heads=2, layers=2, context=16), 40, 1).save_pretrained(folder)
    return folder


def plain_steps(folder: Path, n: int) -> dict[str, torch.Tensor]:
    """The same updates, a row at a time, without DeepSpeed, ranks or padding."""
    policy, original = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    for _ in range(n):
        loss = 0
        for sample, weight in zip(samples(), WEIGHTS, strict=True):
            for prompt, tokens in zip(sample.prompts, sample.token_ids, strict=True):
                ids = torch.tensor([[*prompt, *tokens]])
                own = token_logprobs(policy, ids)[:, len(prompt) - 1 :]
                with torch.no_grad():
                    reference = token_logprobs(original, ids)[:, len(prompt) - 1 :]
                ones = torch.ones_like(own)
                loss = loss + policy_loss(own, reference, ones, torch.tensor([weight]), ALPHA, len(WEIGHTS))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        optimizer.step()
    return dict(policy.named_parameters())


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_of_deepspeed_equal_plain_torch_and_resume_exactly(tmp_path, model, stage):
    trainer = {
        "processes": 2, "zero_stage": stage, "batch_size": 4, "lr": LR, "clip_norm": CLIP, "warmup_steps": 0,
    }  # fmt: skip
    align = {"trainer": trainer, "objective": {"alpha": ALPHA}, "wait_timeout_s": 60}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": "none", "run": str(tmp_path), "align": align}))
    SampleLog(tmp_path / "samples").append(0, samples())
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate/cpu.yaml",
        "--main_process_port", str(29600 + stage), "tests/align/policy_steps.py", str(recipe), str(model),
        str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

    for name, n in (("one-step", 1), ("two-steps", 2)):
        found, expected = load_file(tmp_path / f"{name}.safetensors"), plain_steps(model, n)
        assert set(expected) <= set(found) | {"lm_head.weight"}
        for key, value in expected.items():
            if key in found:
                torch.testing.assert_close(
                    found[key], value.detach(), rtol=1e-3, atol=2e-5, msg=lambda m, k=key: f"{k}: {m}"
                )
    one, two, restored, resumed = (
        load_file(tmp_path / f"{name}.safetensors") for name in ("one-step", "two-steps", "restored", "resumed")
    )
    assert all(torch.equal(one[key], restored[key]) for key in one)
    assert all(torch.equal(two[key], resumed[key]) for key in two)
    assert any(not torch.equal(one[key], two[key]) for key in one)


def test_the_recipe_decides_what_deepspeed_leaves_open():
    content = deepspeed_config(TrainerConfig(zero_stage=3, batch_size=12, processes=4, clip_norm=0.1, bf16=True))
    assert content["zero_optimization"]["stage"] == 3
    assert content["train_micro_batch_size_per_gpu"] == 3
    assert content["gradient_clipping"] == 0.1
    assert content["bf16"] == {"enabled": True}


def test_the_default_objective_is_the_papers():
    assert ObjectiveConfig().baseline == "none"
    assert ObjectiveConfig().max_ratio is None
