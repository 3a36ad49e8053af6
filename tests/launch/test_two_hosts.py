"""Several nodes without SLURM: two hosts, each a network namespace of its own, with one cable between them."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from rec.job import open_run
from rec.runtime.runfolder import RunFolder

ROOT = Path(__file__).parents[2]
HOSTS, CABLE, ADDRESSES = ("recalign-a", "recalign-b"), ("rcl-a", "rcl-b"), ("10.213.7.1", "10.213.7.2")
TIMEOUT_S = 15


def ip(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False)


def may_make_namespaces() -> bool:
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    made = ip("netns", "add", "recalign-probe").returncode == 0
    ip("netns", "del", "recalign-probe")
    return made


pytestmark = [
    pytest.mark.netns,
    pytest.mark.distributed,
    pytest.mark.skipif(not may_make_namespaces(), reason="network namespaces need iproute2 and root"),
]


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    for host in HOSTS:
        ip("netns", "add", host)
    ip("link", "add", CABLE[0], "netns", HOSTS[0], "type", "veth", "peer", "name", CABLE[1], "netns", HOSTS[1])
    for host, end, address in zip(HOSTS, CABLE, ADDRESSES, strict=True):
        ip("-n", host, "addr", "add", f"{address}/24", "dev", end)
        ip("-n", host, "link", "set", "lo", "up")
        assert ip("-n", host, "link", "set", end, "up").returncode == 0
    yield HOSTS
    for host in HOSTS:
        ip("netns", "del", host)


def launch(number: int, recipe: Path) -> subprocess.Popen:
    """The line of launch/accelerate/multi-node.yaml, on one of the hosts."""
    command = [
        "ip", "netns", "exec", HOSTS[number], sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", "launch/accelerate/multi-node.yaml", "--num_machines", "2", "--num_processes", "2",
        "--machine_rank", str(number), "--main_process_ip", ADDRESSES[0], "--main_process_port", "29500",
        "-m", "rec.train", "--config", str(recipe),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "GLOO_SOCKET_IFNAME": CABLE[number],
        "RECALIGN_TIMEOUT_S": str(TIMEOUT_S),
    }
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(jobs: list[subprocess.Popen], timeout_s: float) -> list[str]:
    said = [job.communicate(timeout=timeout_s)[0] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], "\n".join(said)
    return said


def test_a_cut_cable_is_one_clear_error_in_bounded_time_and_the_run_goes_on(hosts, small_data, tmp_path):
    rec = {
        "model": {"name": "SASRec", "dim": 16, "heads": 2, "blocks": 1, "max_length": 8, "dropout": 0.2},
        "train": {"lr": 5e-3, "batch_size": 8, "epochs": 60, "patience": 60, "checkpoint_every": 1},
    }
    recipes = []
    for name in ("whole", "cut"):
        recipes.append(tmp_path / f"{name}.yaml")
        run = {"data": str(small_data.folder), "run": str(tmp_path / name), "rec": rec}
        recipes[-1].write_text(yaml.safe_dump(run))
    finish([launch(number, recipes[0]) for number in range(2)], 300)

    jobs, run = [launch(number, recipes[1]) for number in range(2)], RunFolder(tmp_path / "cut")
    end = time.monotonic() + 120
    while len(run.events("epoch")) < 3 and time.monotonic() < end:
        time.sleep(0.02)
    assert ip("-n", HOSTS[1], "link", "set", CABLE[1], "down").returncode == 0
    cut = time.monotonic()
    said = [job.communicate(timeout=900)[0] for job in jobs]
    assert time.monotonic() - cut < TIMEOUT_S + 60
    assert all(job.returncode != 0 for job in jobs)
    for text in said:
        [line] = [line for line in text.splitlines() if line.startswith("lost contact with other processes")]
        assert "Start the same command again" in line
        assert "Traceback (most recent call last):\n  File" not in text.split(line)[0]
    assert run.result() is None

    ip("-n", HOSTS[1], "link", "set", CABLE[1], "up")
    finish([launch(number, recipes[1]) for number in range(2)], 300)
    whole, cut_run = (open_run(tmp_path / name).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(value, cut_run[name]) for name, value in whole.items())
    losses, others = (
        [row["loss"].hex() for row in RunFolder(tmp_path / name).steps("epoch")] for name in ("whole", "cut")
    )
    assert losses == others
