"""What MFU counts, by hand."""

import math

import pytest
from transformers import GPT2Config

from llm.lmrec import build_lmrec
from llm.lmrec_job import LMRecJob
from llm.speed import flops_per_token, stated_flops
from rec.runtime.config import build


def test_flops_of_a_preset_by_hand():
    llm = build(LMRecJob, {"data": "x", "run": "y", "llm": {"lmrec": {"preset": "125M"}}}).llm
    parameters = 12 * (12 * 768**2 + 13 * 768) + 50_258 * 768 + 2_048 * 768 + 2 * 768  # blocks, tables, last norm
    model = build_lmrec(llm.lmrec, 50_258, 0)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    looked_up = 2_048 * 768
    attention = 12 * 12 * 768 * 512
    found = flops_per_token(model.config, parameters, 512)
    assert found == 6 * (parameters - looked_up) + attention
    without = flops_per_token(model.config, parameters, 512, output=False)
    assert without == 6 * (parameters - looked_up - 50_258 * 768) + attention


def test_an_untied_table_of_inputs_is_looked_up_and_not_computed_with():
    tied = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=100, n_positions=10)
    untied = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=100, n_positions=10, tie_word_embeddings=False)
    for output in (True, False):
        assert flops_per_token(untied, 5_000 + 800, 4, output) == flops_per_token(tied, 5_000, 4, output)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12), ("NVIDIA A10G", 70e12), ("NVIDIA A10", 125e12), ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-16GB", 125e12), ("NVIDIA RTX A1000", math.inf), ("NVIDIA GeForce RTX 4090", math.inf),
    ],
)  # fmt: skip
def test_a_device_is_known_by_its_whole_name(name, expected):
    assert stated_flops(name) == expected
