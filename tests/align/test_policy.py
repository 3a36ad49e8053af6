"""The real DeepSpeed on two real ranks against plain torch on one."""

import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, OPTConfig

from align.config import LoRAConfig, MainJob, ObjectiveConfig, TrainerConfig
from align.policy import Rows, deepspeed_config, layers_to_adapt
from align.samples import Sample, SampleLog, Text
from align.trainer import make_accelerator
from llm.causal_lm import load_causal_lm
from llm.config import LMRecConfig
from llm.end_to_end import EndToEnd, logits_at, use_end_to_end
from llm.lmrec import build_lmrec
from rec.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
ALPHA, LR, CLIP = 0.3, 1e-2, 0.5
LORA = {"rank": 4, "alpha": 6}
WEIGHTS = [[0.5, -0.5], [-1.0, 1.5], [2.0, 0.0], [3.0, -2.0]]
# Two samples with two fresh items, one with one, one whose texts are only the end of sequence; two draws of each.
TEXTS = [
    ([[5, 6], [7]], [[[8, 9, 1], [10]], [[8, 9, 1], [2, 2]]]),
    ([[11]], [[[12, 13]], [[3, 1]]]),
    ([[5, 6, 7], [9, 8]], [[[3], [4, 4, 4, 1]], [[8, 1], [1]]]),
    ([[20]], [[[1]], [[1]]]),
]


def make_sample(ordinal: int, prompts: list[list[int]], draws: list[list[list[int]]]) -> Sample:
    seeds = itertools.count(100 * ordinal)
    texts = [[Text(next(seeds), tokens, [-3.6 - 0.4 * nth] * len(tokens), "") for tokens in draw]
             for nth, draw in enumerate(draws)]  # fmt: skip
    return Sample(ordinal, 0, [1], 1, True, True, [0] * len(prompts), prompts, texts, [], [0.0, 0.0], 0.0, 0, 0)


def samples() -> list[Sample]:
    return [make_sample(ordinal, *texts) for ordinal, texts in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "model"
    torch.manual_seed(0)
    build_lmrec(LMRecConfig(dim=32, heads=2, layers=2, context=16), 40, 1).save_pretrained(folder)
    return folder


def plain_loss(policy, original, prompts, draw, weight, kl: str = "exact") -> torch.Tensor:
    """Of one draw, with the exact or sampled KL and importance weights that are capped at 2, place by place."""
    scored, log_ratio = [], 0.0
    for prompt, text in zip(prompts, draw, strict=True):
        ids = torch.tensor([[*prompt, *text.token_ids]])
        log_p = policy(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            log_orig = original(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        chosen = log_p[torch.arange(len(text.token_ids)), text.token_ids]
        of_original = log_orig[torch.arange(len(text.token_ids)), text.token_ids]
        divergences = (log_p.exp() * (log_p - log_orig)).sum(-1) if kl == "exact" else (chosen - of_original).detach()
        log_ratio += float(chosen.detach().sum()) - sum(text.logprobs)
        scored.append((chosen, divergences))
    gain = 0.0
    for chosen, divergences in scored:
        gain = gain + weight * chosen.sum()
        if kl == "exact":
            gain = gain - ALPHA * divergences.sum()
        for place in range(len(chosen)):
            # A sampled token's own difference is its score's to answer for, an exact divergence is differentiated.
            later = divergences[place + (kl == "exact") :]
            gain = gain - ALPHA * float(later.detach().sum()) * chosen[place]
    return -min(2.0, math.exp(log_ratio)) * gain


def plain_steps(folder: Path, n: int, kl: str = "exact") -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """The same updates, a row at a time, without DeepSpeed, ranks or padding: weights, losses and gradients' norms."""
    policy, original = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    optimizer, told = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0), []
    for _ in range(n):
        loss = 0
        for sample, weights in zip(samples(), WEIGHTS, strict=True):
            for draw, weight in zip(sample.draws, weights, strict=True):
                loss = loss + plain_loss(policy, original, sample.prompts, draw, weight, kl) / (2 * len(WEIGHTS))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
        told.append({"loss": loss.item(), "norm": norm.item()})
        optimizer.step()
    return dict(policy.named_parameters()), told


def two_steps(out: Path, model: Path, port: int, launcher: str = "cpu", kl: str = "exact", **trainer: object) -> None:
    """Run ``policy_steps`` on two ranks, by one of the shipped YAML files; what it writes is in ``out``."""
    settings = {"processes": 2, "batch_size": 4, "lr": LR, "clip_norm": CLIP, "warmup_steps": 0, **trainer}
    objective = {"alpha": ALPHA, "samples": 2, "kl": kl, "max_importance": 2.0}
    align = {"trainer": settings, "objective": objective, "wait_timeout_s": 60}
    recipe = out / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": "none", "run": str(out), "align": align}))
    SampleLog(out / "samples").append(0, samples())
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", f"launch/accelerate/{launcher}.yaml",
        "--num_machines", "1", "--num_processes", "2", "--main_process_ip", "127.0.0.1",
        "--main_process_port", str(port), "tests/align/policy_steps.py", str(recipe), str(model), str(out),
    ]  # fmt: skip
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("launcher", "stage", "offload", "kl"),
    [
        ("cpu", 1, False, "exact"), ("gpu", 2, False, "exact"), ("multi-node", 3, False, "exact"),
        ("cpu", 3, True, "exact"), ("cpu", 2, False, "sampled"),
    ],
)  # fmt: skip
def test_two_ranks_of_deepspeed_equal_plain_torch_and_resume_exactly(tmp_path, model, launcher, stage, offload, kl):
    two_steps(tmp_path, model, 29600 + stage, launcher, kl, zero_stage=stage, offload=offload)
    for name, n in (("one-step", 1), ("two-steps", 2)):
        found = load_file(tmp_path / f"{name}.safetensors")
        expected, plain = plain_steps(model, n, kl)
        # AdamW forgives any factor of the gradient: its norm and the loss tell whether ranks were averaged.
        for step, told in enumerate(plain):
            assert json.loads((tmp_path / "told.json").read_text())[step] == pytest.approx(told, rel=1e-3)
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
    policy = AutoModelForCausalLM.from_pretrained(model)
    policy.load_state_dict(two, strict=False)
    ids = torch.tensor([[5, 6, 7, 8]])
    by_hand = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)[range(3), ids[0, 1:]].tolist()
    found = [float(value) for value in (tmp_path / "logprobs.txt").read_text().split()]
    assert found == pytest.approx(by_hand, abs=1e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "llama"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    return folder


def plain_lora_step(folder: Path, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """One update of adapters by hand: h + (alpha / rank) B A x in every linear layer, without peft."""
    original, policy = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    policy.requires_grad_(False)
    trained = {name: value.clone().requires_grad_() for name, value in before.items()}
    for name, module in policy.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            key = f"base_model.model.model.{name}.lora_{{}}.default.weight"
            down, up = trained[key.format("A")], trained[key.format("B")]
            module.register_forward_hook(
                lambda _, x, y, a=down, b=up: y + LORA["alpha"] / LORA["rank"] * x[0] @ a.T @ b.T
            )
    optimizer = torch.optim.AdamW(trained.values(), lr=LR, weight_decay=0.0)
    loss = 0
    for sample, weights in zip(samples(), WEIGHTS, strict=True):
        for draw, weight in zip(sample.draws, weights, strict=True):
            loss = loss + plain_loss(policy, original, sample.prompts, draw, weight) / (2 * len(WEIGHTS))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
    optimizer.step()
    return trained


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_on_two_ranks_equal_adapters_by_hand_and_resume_exactly(tmp_path, llama, stage):
    two_steps(tmp_path, llama, 29610 + stage, zero_stage=stage, lora=LORA)
    names = ("begin", "one-step", "two-steps", "restored", "resumed")
    begin, one, two, restored, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in names)
    # Seven linear layers in each of two blocks, and nothing else.
    assert len(begin) == 2 * 7 * 2
    assert all("lora_" in name for name in begin)
    assert all(bool(value.any()) == ("lora_A" in name) for name, value in begin.items())
    first = plain_lora_step(llama, begin)
    # AdamW's first step is nearly the sign of the gradient: where that is close to 0, rounding is a share of a step.
    for name, value in one.items():
        torch.testing.assert_close(value, first[name].detach(), rtol=1e-3, atol=2e-4, msg=lambda m, k=name: f"{k}: {m}")
    assert all(torch.equal(one[name], restored[name]) for name in one)
    assert all(torch.equal(two[name], resumed[name]) for name in two)
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_the_recipe_decides_what_deepspeed_leaves_open():
    content = deepspeed_config(TrainerConfig(zero_stage=3, batch_size=12, processes=4, clip_norm=0.1, bf16=True))
    assert content["zero_optimization"]["stage"] == 3
    assert content["train_micro_batch_size_per_gpu"] == 3
    assert content["gradient_clipping"] == 0.1
    assert content["bf16"] == {"enabled": True}
    assert "offload_param" not in content["zero_optimization"]
    offloaded = deepspeed_config(TrainerConfig(zero_stage=3, offload=True))
    assert offloaded["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_a_stage_that_the_launchers_file_names_is_refused_not_ignored(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "mine.json")
    with pytest.raises(UserError, match=r"the ZeRO stage is the recipe's .* take deepspeed_config_file mine\.json out"):
        make_accelerator(MainJob(data="x", run="y"))


def test_the_default_objective_is_the_papers():
    assert ObjectiveConfig().baseline == "none"
    assert ObjectiveConfig().max_ratio is None
    assert ObjectiveConfig().samples == 1
    assert ObjectiveConfig().denominator == "base"
    assert ObjectiveConfig().kl == "sampled"
    assert ObjectiveConfig().max_importance is None


def test_a_text_in_two_histories_is_one_row_and_equal_texts_of_two_draws_are_two():
    def text(seed: int) -> Text:
        return Text(seed, [8], [-0.5], "x") if seed == 2 else Text(seed, [8, 1], [-0.5, -0.25], "x")

    shared = [make_sample(0, [[5, 6], [7]], []), make_sample(1, [[5, 6]], [])]
    shared[0] = replace(shared[0], draws=[[text(1), text(2)], [text(3), text(2)]])
    shared[1] = replace(shared[1], draws=[[text(1)], [text(3)]])
    rows = Rows.of(shared, torch.device("cpu"))
    assert rows.laid.ids.tolist() == [[5, 6, 8, 1, 7, 8, 5, 6, 8, 1]]
    assert rows.laid.bounds.tolist() == [0, 4, 6, 10]
    assert rows.laid.ids[0, rows.places + 1].tolist() == rows.next_ids.tolist()
    assert rows.mask.tolist() == [[1, 1], [1, 0], [1, 1]]
    assert rows.drawn.tolist() == [[-0.5, -0.25], [-0.5, 0], [-0.5, -0.25]]
    assert rows.by_text(torch.arange(1.0, 6.0)).tolist() == [[1, 2], [3, 0], [4, 5]]
    assert sorted(zip(rows.texts.tolist(), rows.samples.tolist(), strict=True)) == [
        (0, 0), (0, 2), (1, 0), (1, 1), (2, 1), (2, 3),
    ]  # fmt: skip


def test_a_text_that_a_history_holds_twice_counts_once():
    twice = replace(make_sample(0, [[5], [5]], []), draws=[[Text(1, [8], [-0.5], "x")] * 2])
    assert Rows.of([twice], torch.device("cpu")).texts.tolist() == [0]


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2),
        OPTConfig(vocab_size=40, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
                  max_position_embeddings=16, word_embed_proj_dim=32),
    ],
    ids=["GPT-2", "OPT"],
)  # fmt: skip
def test_a_model_that_was_trained_with_dropout_is_the_same_while_it_trains(tmp_path, config):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    whole = load_causal_lm(tmp_path)
    end_to_end = use_end_to_end(whole)
    laid = EndToEnd.of([[5, 6, 7, 8], [9, 10]])
    places = torch.tensor([0, 2, 4])
    found = [logits_at(model, laid, places, end_to_end) for model in (whole.train(), whole.train(), whole.eval())]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_layers_to_adapt_are_named_without_weights_or_refused(llama):
    assert len(layers_to_adapt(str(llama), LoRAConfig())) == 2 * 7
    assert all("q_proj" in name for name in layers_to_adapt(str(llama), LoRAConfig(target_modules=["q_proj"])))
    for none in (["nope"], []):
        with pytest.raises(UserError, match=r"align\.trainer\.lora"):
            layers_to_adapt(str(llama), LoRAConfig(target_modules=none))
