import os
import subprocess
import sys

import pytest
import torch

from rec.batches import make_batches
from rec.build import build_model
from rec.config import RecConfig
from rec.linear_cross_entropy import linear_cross_entropy
from rec.runtime.config import build
from rec.runtime.determinism import ASKED

PROGRAM = """
import os, torch
from rec.runtime.logs import run_main
run_main(lambda: print(torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
"""


@pytest.mark.parametrize(("asked", "told"), [("1", "True :4096:8"), ("0", "False None"), (None, "False None")])
def test_every_process_takes_deterministic_kernels_if_the_environment_asks(asked, told):
    environment = {key: value for key, value in os.environ.items() if key not in (ASKED, "CUBLAS_WORKSPACE_CONFIG")}
    environment |= {} if asked is None else {ASKED: asked}
    told_by = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert told_by.stdout.strip() == told


@pytest.mark.parametrize("name", ["BST", "LightGCN", "LightSANs", "PAUP"])
def test_gradients_are_the_same_bits_every_time_with_several_threads(small_data, name):
    """At sizes at which indexing would have several threads add up the gradients of a row that is taken often."""
    config = build(RecConfig, {"model": {"name": name, "dim": 128}, "train": {"batch_size": 512}})
    model, threads = build_model(config, small_data), torch.get_num_threads()
    batch = next(make_batches(model, small_data, config.train).epoch(0, 0))
    torch.set_num_threads(2)
    try:
        found = []
        for _ in range(20):
            torch.manual_seed(1)
            loss = model.training_loss(batch, linear_cross_entropy)
            found.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    finally:
        torch.set_num_threads(threads)
    for own in found:
        assert all(one is None or torch.equal(one, first) for one, first in zip(own, found[0], strict=True))
