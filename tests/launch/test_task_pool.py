"""Functions in processes of their own: order, dependencies, failures."""

import operator
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.task_pool import Task, run_all


def note(path: Path, name: str) -> None:
    with path.open("a") as stream:
        stream.write(f"{name} {os.getpid()}\n")


def noted(path: Path) -> list[str]:
    return [line.split()[0] for line in path.read_text().splitlines()]


def fail() -> None:
    raise OSError("as it was asked to")


def tasks_of(path: Path, needs: dict[str, list[str]]) -> dict[str, Task]:
    return {name: Task(own, lambda name=name: (note, (path, name))) for name, own in needs.items()}


@pytest.mark.parametrize("processes", [1, 2])
def test_each_is_called_once_and_after_what_it_needs(tmp_path, processes):
    needs = {"d": ["b", "c"], "b": ["a"], "c": ["a"], "a": [], "e": []}
    names = list(run_all(tasks_of(tmp_path / "notes", needs), processes, tmp_path / "log"))
    assert sorted(names) == sorted(noted(tmp_path / "notes")) == sorted(needs)
    for name, own in needs.items():
        assert all(names.index(before) < names.index(name) for before in own)
    if processes == 1:
        assert names == ["a", "b", "c", "d", "e"]


def test_what_it_needs_is_done_before_it_is_asked_what_to_do(tmp_path):
    path, asked = tmp_path / "notes", []

    def make():
        asked.append(noted(path))
        return None

    tasks = tasks_of(path, {"a": []}) | {"nothing": Task(["a"], make)} | tasks_of(path, {"b": ["nothing"]})
    assert list(run_all(tasks, 1, tmp_path / "log")) == ["a", "b"]
    assert asked == [["a"]]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent has died")
def test_whoever_dies_takes_its_workers_along_even_while_they_start(tmp_path):
    program = (
        "import os, sys, threading, time\n"
        "from pathlib import Path\n"
        "from launch.task_pool import Task, run_all\n"
        "import test_task_pool\n"
        "if __name__ == '__main__':\n"
        "    threading.Timer(0.3, lambda: os._exit(9)).start()\n"
        "    path = Path(sys.argv[1])\n"
        "    list(run_all({0: Task([], lambda: (test_task_pool.note, (path / 'notes', 'late')))}, 2, path / 'log'))\n"
    )
    (tmp_path / "study.py").write_text(program)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    command = [sys.executable, str(tmp_path / "study.py"), str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=300)
    # All that hold its standard output have ended when that is over.
    assert done.returncode == 9, done.stderr
    assert not (tmp_path / "notes").exists()


def test_several_run_at_a_time_in_processes_of_their_own(tmp_path):
    tasks = {seconds: Task([], lambda seconds=seconds: (time.sleep, (seconds,))) for seconds in (4.0, 0.01, 0.02)}
    assert list(run_all(tasks, 2, tmp_path / "log"))[-1] == 4.0
    pids = {name: Task([], lambda name=name: (note, (tmp_path / "notes", name))) for name in "ab"}
    list(run_all(pids, 2, tmp_path / "log"))
    assert str(os.getpid()) not in (tmp_path / "notes").read_text()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failure_is_raised_and_nothing_begins_after_it(tmp_path, processes):
    tasks = {"bad": Task([], lambda: (fail, ()))} | tasks_of(tmp_path / "notes", {"next": ["bad"]})
    with pytest.raises(OSError, match="as it was asked to"):
        list(run_all(tasks, processes, tmp_path / "log"))
    assert not (tmp_path / "notes").exists()


def test_a_need_that_nothing_makes_is_no_endless_wait(tmp_path):
    with pytest.raises(ValueError, match="b needs what nothing makes"):
        list(run_all({"b": Task(["a"], lambda: (operator.add, (1, 2)))}, 1, tmp_path / "log"))
