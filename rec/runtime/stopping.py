"""Stopping on purpose: a file in the run folder asks for it; the job saves its state and ends within a step.

A file, and no signal: under ``accelerate launch`` a signal ends the launcher before its ranks could save anything. A
batch script that is told that its time is up writes ``RUN/STOP``; so may a person. Rank 0 alone looks for the file and
tells the others, so ranks never disagree, however late a shared folder shows it to whom. The job itself never removes
the file, or a request that comes while it starts would be lost; nor does anybody else remove a person's. What a batch
script writes there begins with ``job``, and the batch script removes it again.
"""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from rec.runtime.errors import Stopped
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import root_of

STOP = "STOP"
LOOK_EVERY_S = 0.5


def is_asked_by_a_person(run: Path) -> bool:
    """Whether the run folder holds a stop file that no batch script has written."""
    path = run / STOP
    return path.exists() and not path.read_bytes().startswith(b"job ")


class StopFile:
    """Whether somebody has asked this run to stop.

    Args:
        run: the run folder, or a folder inside it that holds one stage of the run.
        ranks: the processes that agree; every one of them makes a StopFile at the same place.
    """

    def __init__(self, run: Path, ranks: Ranks | None = None) -> None:
        self.path, self.ranks = root_of(run) / STOP, ranks or Ranks()
        self._looked, self._seen = -LOOK_EVERY_S, False
        # On the CPU's own group: asking must not make a GPU wait for the step that it is computing.
        several = self.ranks.size > 1
        self._group = dist.new_group(backend="gloo") if several and dist.get_backend() != "gloo" else None

    def seen(self) -> bool:
        """Whether the file is there, as this process sees it; looks twice a second at most."""
        now = time.monotonic()
        if not self._seen and now - self._looked >= LOOK_EVERY_S:
            self._looked, self._seen = now, self.path.exists()
        return self._seen

    def agreed(self) -> bool:
        """Rank 0's answer, on every rank; all of them call this at the same step."""
        if self.ranks.size == 1:
            return self.seen()
        answer = torch.tensor([int(self.ranks.is_first and self.seen())])
        dist.broadcast(answer, src=0, group=self._group)
        return bool(answer)

    def stopped(self, place: str) -> Stopped:
        """The exception that ends the job, ``place`` saying how far it got."""
        return Stopped(f"{self.path} asks for it: stopped {place}; without that file, the same command goes on")
