"""A real SLURM on this machine, and what tests ask of it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.cluster.identities import identities
from rec.runtime.checkpoint import Checkpoints
from rec.runtime.runfolder import RunFolder

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm" / "test-cluster.sh"
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"


class Cluster:
    """Four nodes of eight cores, with a warning before preemption and before the time limit.

    Args:
        folder: of the cluster; configuration, keys, logs, state.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": PATH,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PYTHONPATH": str(ROOT),
            "RECALIGN_PYTHON": sys.executable,
            "RECALIGN_GRACE_S": "20",
            "OMP_NUM_THREADS": "1",
        }

    def run(self, *command: str | Path) -> str:
        """What a command printed; it must succeed."""
        done = subprocess.run(
            [*map(str, command)],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def recalign(self, *arguments: str | Path) -> str:
        return self.run(sys.executable, "-m", "launch.cli", *arguments)

    def submit(self, *arguments: str | Path) -> str:
        """The number of the job."""
        said = self.recalign("submit", *arguments)
        assert said.startswith("Submitted job "), said
        return said.split()[2]

    def state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ..."""
        said = self.run("scontrol", "show", "job", job)
        return said.partition("JobState=")[2].split()[0]

    def wait(self, job: str, run: RunFolder, condition: Callable[[], bool], timeout_s: float = 600) -> None:
        """Until something holds; the job must not end before."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert self.state(job) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"), everything(run)
            assert time.monotonic() < end, everything(run)
            time.sleep(0.3)

    def end(self, job: str, run: RunFolder, state: str, timeout_s: float = 900) -> None:
        """Until the job is over, in this state."""
        end = time.monotonic() + timeout_s
        while (found := self.state(job)) in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
            assert time.monotonic() < end, everything(run)
            time.sleep(0.5)
        assert found == state, everything(run)

    def finish(self, job: str, run: RunFolder, timeout_s: float = 900) -> None:
        """Until the job is over, which must be because its run is finished."""
        self.end(job, run, "COMPLETED", timeout_s)
        assert run.result() is not None, everything(run)


def assert_the_doctor_knows_every_stage(run: RunFolder) -> None:
    """What every checkpoint of a run was written with is what the doctor would compare it to."""
    known = identities(run.path)
    found = [checkpoint for folder in run.path.rglob("checkpoints") for checkpoint in Checkpoints(folder).examine()]
    assert found
    for finding in found:
        assert known[finding.folder.parents[1]].differences(finding.checkpoint.meta) == [], finding.folder


def everything(run: RunFolder) -> str:
    """All logs of a run, for the message of a failed test."""
    paths = [*sorted(run.path.glob("slurm/*.out")), *sorted(run.path.glob("logs/job-*/*.log"))]
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)


@contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """A cluster, ended with all that it started."""
    cluster = Cluster(folder)
    try:
        cluster.run(SCRIPT, "start", folder)
        yield cluster
    finally:
        cluster.run(SCRIPT, "stop", folder)
