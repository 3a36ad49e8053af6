"""Fifty kills -9 at random points of alignment: python tests/launch/soak.py (about 10 minutes on 2 cores).

Whatever is killed, no sample may be lost or trained on twice, every run must finish, and its weights must be those of
its own replay. Two kinds of kill of five wait for a save of a checkpoint or a publication of a snapshot to begin.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from tiny_job import (
    RECIPE,
    ROOT,
    assert_dead,
    assert_no_sample_lost_or_repeated,
    final_weights,
    finish,
    start,
)

sys.path.insert(0, str(ROOT / "tests"))
from worlds import make_raw

from rec.data.prepare import Filters, prepare
from rec.runtime import files
from rec.runtime.runfolder import CONFIG, RunFolder

TARGETS = ("generator", "trainer rank", "launcher", "checkpoint", "snapshot")
LONGEST_WAIT_S, ATTEMPT_S = 6.0, 20.0


def main() -> None:
    """Kill until it is enough, then say what happened; any broken promise ends it with a traceback."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, begin, killed, runs = random.Random(arguments.seed), time.monotonic(), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        before = ready_to_align(Path(folder))
        while killed.total() < arguments.kills:
            runs += 1
            run = Path(folder) / f"run-{runs}"
            shutil.copytree(before, run)
            finish(run, disturb(run, rng, killed, arguments.kills), timeout_s=600)
            assert_no_sample_lost_or_repeated(RunFolder(run))
            assert_equals_its_replay(run)
            sys.stdout.write(f"run {runs} finished and equals its replay; kills so far: {dict(killed)}\n")
            sys.stdout.flush()
    minutes = (time.monotonic() - begin) / 60
    sys.stdout.write(f"{killed.total()} kills, {runs} runs, none lost a sample or a bit; {minutes:.1f} minutes\n")


def ready_to_align(folder: Path) -> Path:
    """The run folder of a job whose earlier stages are done."""
    prepare("soak", make_raw(folder / "raw"), folder / "data", Filters(k_core=0))
    align = {**RECIPE["align"], "max_restarts": 1000}
    recipe, run = folder / "recipe.yaml", folder / "before"
    recipe.write_text(yaml.safe_dump({**RECIPE, "data": str(folder / "data"), "run": str(run), "align": align}))
    command = [sys.executable, "-m", "launch.cli", "align", str(recipe), "--stop-before-alignment"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return run


def disturb(run: Path, rng: random.Random, killed: collections.Counter, enough: int) -> subprocess.Popen:
    """Start the run and kill parts of it until it ends or it is ``enough``; the process to wait for."""
    process = start(run)
    while killed.total() < enough and process.poll() is None:
        target = rng.choice(TARGETS)
        time.sleep(rng.uniform(0, LONGEST_WAIT_S))
        if kill(target, run, process, rng):
            killed[target] += 1
        if process.poll() == -signal.SIGKILL:
            process = start(run)
    return process


def kill(target: str, run: Path, process: subprocess.Popen, rng: random.Random) -> bool:
    """Whether there was something to kill; of a launcher, after its jobs have died with it."""
    if process.poll() is not None:
        return False
    if target == "launcher":
        jobs = pids(run, "align.")
        process.kill()
        process.wait()
        assert_dead(jobs)
        return True
    if target in ("checkpoint", "snapshot"):
        folder, end = run / f"{target}s", time.monotonic() + ATTEMPT_S
        while not list(folder.glob(f"{files.TEMPORARY_PREFIX}*")):
            if process.poll() is not None or time.monotonic() > end:
                return False
    found = pids(run, "align.generator" if target == "generator" else "align.trainer")
    if not found:
        return False
    os.kill(rng.choice(found), signal.SIGKILL)
    return True


def pids(run: Path, module: str) -> list[int]:
    """Processes of the run that have ``module`` in their command line, but for accelerate's launcher."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        if str(run / CONFIG) in words and any(module in word for word in words) and "--num_processes" not in words:
            found.append(int(path.parent.name))
    return found


def assert_equals_its_replay(run: Path) -> None:
    """What ``recalign align --replay`` says, and the final snapshot is there."""
    command = [sys.executable, "-m", "launch.cli", "align", "--replay", str(run)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert final_weights(RunFolder(run))


if __name__ == "__main__":
    main()
