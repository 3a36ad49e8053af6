"""Who I am among the processes of a job, and the few things that ranks agree on."""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from rec.runtime.errors import LostContact, Stopped, UserError

T = TypeVar("T")

TIMEOUT = "RECALIGN_TIMEOUT_S"
DEFAULT_TIMEOUT_S = 1800.0
SETTLING_S = 0.2
# What gloo, NCCL and the store say when a process, a node or a link is gone. They raise RuntimeErrors for bugs too.
GONE = re.compile(
    r"Timed out waiting|Connection (closed|reset|refused)|Broken pipe|No route to host|Network is unreachable|Socket"
    r" Timeout|[Ww]ait timeout|remote process exited|Watchdog caught collective|connection was aborted|failed to recv",
)


def timeout() -> timedelta:
    """How long ranks wait for each other before they give up; a setting of the site, not of the recipe.

    Raises:
        UserError: if RECALIGN_TIMEOUT_S is no number above 0.
    """
    given = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT_S))
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not seconds > 0:
        raise UserError(f"{TIMEOUT}={given} is no number of seconds")
    return timedelta(seconds=seconds)


@contextlib.contextmanager
def lost_contact_is_named() -> Iterator[None]:
    """Say in one line that other ranks are gone, where the libraries print a page about a failed operation.

    Raises:
        LostContact: instead of what they raise.
    """
    try:
        yield
    except RuntimeError as error:
        if not GONE.search(str(error)):
            raise
        reason = " ".join(str(error).split())[:160]
        raise LostContact(
            f"lost contact with other processes of this job ({reason}): one of them, its node or the link to it is"
            " gone. Start the same command again, and it goes on from its last checkpoint"
        ) from error


def use_own_gpu() -> None:
    """From now on "cuda" is this process's own GPU, as its launcher counts them; does nothing without one."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextlib.contextmanager
def left_together() -> Iterator[None]:
    """Leave the process group with all ranks at once, at the end and where a run is stopped.

    gloo may wait for ever to leave a group that others have left long ago. A rank that fails waits for nobody.
    """
    try:
        yield
    except Stopped:
        _leave()
        raise
    _leave()


def _leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        # gloo's threads need the interpreter's lock to drop the tensors of their last message. DDP's reducer waits for
        # these threads while it holds that lock, if it is what is deleted last, and a thread that is still at it when
        # the interpreter ends aborts the process. Asleep, this thread leaves them the lock.
        time.sleep(SETTLING_S)
        dist.destroy_process_group()


@dataclass(frozen=True)
class Ranks:
    """This process's place in its job: ``rank`` of ``size``."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> "Ranks":
        """From the initialised process group, or a single process."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def is_first(self) -> bool:
        """True on rank 0, the only one that decides and writes shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks, on every rank."""
        if self.size == 1:
            return [value]
        everybody: list[T] = [value] * self.size
        dist.all_gather_object(everybody, value)
        return everybody

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0)
        return holder[0]

    def from_first(self, compute: Callable[[], T]) -> T:
        """What ``compute`` gives on rank 0, the only one that calls it, on every rank.

        Raises:
            UserError: on every rank, if it does so on rank 0: none is left waiting for what never comes.
        """
        answer, error = None, None
        if self.is_first:
            try:
                answer = compute()
            except UserError as mistake:
                error = mistake
        answer, error = self.broadcast((answer, error))
        if error is not None:
            raise error
        return answer
