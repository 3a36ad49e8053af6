"""recalign check: what it measures, and what it makes of that."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cluster import check
from rec.runtime.ranks import Ranks

ROOT = Path(__file__).parents[2]


def measured(**more: object) -> dict:
    facts = {"rank": 0, "host": "a", "address": "10.0.0.1", "python": "3.11.7", "gpus": [], "cores": 8}
    speeds = {"sees_the_folder": 0.01, "write_mb_per_s": 900.0, "skew_s": 0.0, "all_reduce_gb_per_s": 20.0}
    versions = check.probe.facts()["versions"]
    return {**facts, **speeds, "versions": versions, "locks_reach": True, **more}


@pytest.mark.parametrize(
    ("difference", "name"),
    [
        ({"address": "127.0.1.1"}, "addresses"),
        ({"address": None}, "addresses"),
        ({"sees_the_folder": None}, "shared folder"),
        ({"sees_the_folder": 9.0}, "rename"),
        ({"locks_reach": False}, "locks"),
        ({"write_mb_per_s": 12.0}, "writing"),
        ({"skew_s": -3.0}, "clocks"),
        ({"python": "3.12.1"}, "python"),
        ({"gpus": ["H100"]}, "gpus"),
    ],
)
def test_what_is_wrong_with_one_node_is_named_with_its_remedy(difference, name, tmp_path):
    fine = list(check.judge([measured(), measured(host="b", rank=1)], tmp_path))
    assert all(result.fine for result in fine), fine
    results = check.judge([measured(), measured(host="b", rank=1, **difference)], tmp_path)
    assert [result.name for result in results if not result.fine] == [name]
    assert check.REMEDIES[name]


def test_a_slow_network_and_other_versions_are_named(tmp_path):
    slow = [measured(all_reduce_gb_per_s=0.1), measured(host="b", all_reduce_gb_per_s=0.1)]
    assert [result.name for result in check.judge(slow, tmp_path) if not result.fine] == ["all-reduce"]
    old = measured(versions=measured()["versions"] | {"torch": "2.4.0"})
    [pins] = [result for result in check.judge([old], tmp_path) if not result.fine]
    assert (pins.name, "torch 2.4.0, tested with" in pins.found) == ("pins", True)


class LooksFirst(Ranks):
    """A rank whose file system remembers, as NFS does, that something was not there when it looked."""

    def __init__(self, folder: Path) -> None:
        super().__init__(0, 1)
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "folder", folder)

    def barrier(self):
        self.seen.append((self.folder / "renamed").exists())


def test_the_rename_is_looked_for_before_it_happens(tmp_path, monkeypatch):
    looked, is_file = [], Path.is_file

    def look(path):
        looked.append((path.name, is_file(path)))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", look)
    ranks = LooksFirst(tmp_path)
    assert check.probe.rename_visible_s(tmp_path, ranks) < 30
    assert looked == [("content", False), ("content", True)]
    assert ranks.seen == [False, False, True]


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(stream, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(check.probe.fcntl, "flock", refuse)
    monkeypatch.setattr(Ranks, "barrier", lambda self: None)
    assert not check.probe.locks_reach(tmp_path, Ranks(1, 2))
    check.probe.locks_reach(tmp_path, Ranks(0, 2))


def test_the_address_is_that_of_the_sites_interface(monkeypatch):
    monkeypatch.setenv("RECALIGN_INTERFACE", "lo")
    assert check.probe.own_address() == "127.0.0.1"
    monkeypatch.setenv("RECALIGN_INTERFACE", "none0")
    assert check.probe.own_address() is None


@pytest.mark.distributed
def test_two_processes_measure_each_other(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29671",
        "-m", "launch.cluster.check", "--folder", str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    said = {line[6:].partition(":")[0]: line for line in done.stdout.splitlines() if line[:4] in ("ok  ", "MEND")}
    assert {"all-reduce", "rename", "locks", "clocks", "versions", "pins"} <= set(said), done.stdout + done.stderr
    assert said["locks"] == "ok    locks: reach every node"
    assert said["rename"].startswith("ok")
    assert list(tmp_path.iterdir()) == []
