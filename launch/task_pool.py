"""Functions in processes of their own, each as soon as those that it needs are done."""

import multiprocessing
import os
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rec.runtime.logs import set_up_logging
from rec.runtime.memory import keep_freed_memory
from rec.runtime.parent import die_with_parent


class Task(NamedTuple):
    """One call, and the names of the tasks that have to be done before."""

    needs: Collection[Hashable]
    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]] | None]
    """Asked when these are done: a function of a module and its arguments, or None if there is nothing to do."""


def run_all(tasks: Mapping[Hashable, Task], processes: int, log_file: Path) -> Iterator[Hashable]:
    """Run tasks, those that come first in ``tasks`` first, and yield the name of each that was called.

    Args:
        tasks: by name.
        processes: how many at a time; the cores are shared out over them. One: in this process.
        log_file: where the processes write what they have to say.

    Raises:
        ValueError: if a task needs one that is not there, or two need each other.
        Exception: whatever a task raises; those that run are waited for, no other begins.
    """
    waiting, done, running = dict(tasks), set(), {}
    with _executor(processes, log_file) as executor:
        while waiting or running:
            while len(running) < processes and (name := _ready(waiting, done)) is not None:
                call = waiting.pop(name).make()
                if call is None:
                    done.add(name)
                else:
                    running[executor.submit(call[0], *call[1])] = name
            if waiting and not running:
                raise ValueError(f"{next(iter(waiting))} needs what nothing makes")
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                future.result()
                done.add(running[future])
                yield running.pop(future)


def _ready(waiting: Mapping[Hashable, Task], done: set[Hashable]) -> Hashable | None:
    return next((name for name, task in waiting.items() if done.issuperset(task.needs)), None)


class _Here(Executor):
    """This very process."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Future:
        future: Future = Future()
        future.set_result(function(*arguments))
        return future


def _executor(processes: int, log_file: Path) -> Executor:
    if processes == 1:
        return _Here()
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(os.getpid(), threads, log_file))


def _begin(parent: int, threads: int, log_file: Path) -> None:
    die_with_parent()
    if os.getppid() != parent:  # it died while this process was importing, and tells nobody any more
        os._exit(1)
    torch.set_num_threads(threads)
    descriptor = os.open(log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    set_up_logging()
    keep_freed_memory()
