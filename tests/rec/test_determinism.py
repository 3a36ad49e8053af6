import os
import subprocess
import sys

import pytest

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
