"""Processes that die with whoever started them, however early that is."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rec.runtime.parent import PARENT

ROOT = Path(__file__).parents[2]
# A rank: it says that it is there, takes its time to start, and asks to die with its launcher's parent.
RANK = """
import sys, time
from pathlib import Path
here = Path(sys.argv[1])
(here / "begun").touch()
while not (here / "go").exists():
    time.sleep(0.01)
from rec.runtime.parent import die_with_parent_if_asked
die_with_parent_if_asked()
(here / "working").touch()
time.sleep(600)
"""
# The parent starts a launcher, and that starts the rank.
LAUNCHER = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
STARTER = f"""
import os, subprocess, sys
environment = os.environ | {{"{PARENT}": str(os.getpid())}}
subprocess.run([sys.executable, "-c", {LAUNCHER!r}, *sys.argv[1:]], env=environment)
"""


def appears(path: Path, within_s: float = 60) -> bool:
    end = time.monotonic() + within_s
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return path.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell of a parent's death")
@pytest.mark.parametrize("early", ["launcher and parent", "parent", None])
def test_a_rank_whose_parent_died_before_it_could_ask_ends(tmp_path, early):
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, RANK, str(tmp_path)],
        cwd=ROOT,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert appears(tmp_path / "begun")
        if early is not None:
            launcher = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
            process.kill()
            process.wait()
            if early != "parent":
                os.kill(launcher, signal.SIGKILL)
        (tmp_path / "go").touch()
        assert appears(tmp_path / "working", 60 if early is None else 3) == (early is None)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
