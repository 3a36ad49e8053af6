"""``recalign check``: is this allocation fit for a job? Run it inside one: from ``salloc`` or a batch script.

It starts one process on every node, lets them measure what a job needs of them (``launch.cluster.probe``), and says
what to mend. ``accelerate launch … -m launch.cluster.check`` does the same where there is no SLURM.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.cluster import probe
from launch.cluster.where import site_file
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.ranks import Ranks, left_together, lost_contact_is_named, timeout

MAX_SKEW_S, SLOW_RENAME_S, SLOW_WRITE_MB_PER_S, SLOW_ALL_REDUCE_GB_PER_S = 1.0, 5.0, 100.0, 0.5


SITE = "launch/slurm/site.sh"
REMEDIES = {
    "addresses": f"host names resolve to loopback or to nothing: set RECALIGN_INTERFACE in {SITE}",
    "all-reduce": f"slow between nodes: set RECALIGN_INTERFACE in {SITE} to the fast network's interface (ip -br addr)",
    "shared folder": "put runs where all nodes see them",
    "rename": "changes are seen late, and the two jobs wait for each other that long (NFS: mount with actimeo=1)",
    "locks": "two jobs on one run folder would not notice each other: mount with locks (Lustre: flock, not localflock)",
    "writing": "checkpoints take long: put runs on a faster file system, or save less often",
    "clocks": "let NTP or chrony run on the nodes: logs of different nodes cannot be put in order",
    "python": "use the same environment, or image, on all nodes",
    "versions": "use the same environment, or image, on all nodes",
    "gpus": "ask for nodes of one kind: all wait for the slowest",
    "pins": "install recalign[gpu] (or recalign[cpu]) anew",
}


@dataclass(frozen=True)
class Result:
    """One thing that was checked: whether it is ``fine``; else the remedy has its name in ``REMEDIES``."""

    name: str
    found: str
    fine: bool


def start(folder: Path, site: Path | None = None) -> int:
    """Check from a shell: on every node of the allocation that this is in, or on this machine; the exit code.

    Args:
        folder: where runs are to live.
        site: the file of site settings, which decide about container and network; None takes the usual one.

    Raises:
        UserError: if there is no such folder or file here, or no srun.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: where are runs to live? --folder")
    settings = site_file(site)
    if "SLURM_JOB_ID" not in os.environ:
        own = [sys.executable, "-m", "launch.cluster.check", "--folder", str(folder.absolute())]
        return subprocess.run(own, check=False).returncode
    if shutil.which("srun") is None:
        raise UserError("this is a SLURM job without srun: check from the batch script, not from inside a container")
    scripts = resources.files("launch.slurm")
    sources = [str(settings), *(str(scripts.joinpath(name)) for name in ("lib.sh", "check.sh"))]
    line = "; ".join(f"source {shlex.quote(path)}" for path in sources)
    environment = {"RECALIGN_PYTHON": sys.executable, **os.environ}
    command = ["bash", "-c", f"set -- {shlex.quote(str(folder.absolute()))}; {line}"]
    return subprocess.run(command, env=environment, check=False).returncode


def measure(folder: Path) -> list[dict[str, Any]] | None:
    """Measure on every rank; what each of them found, on rank 0, None elsewhere.

    Args:
        folder: where runs are to live, shared by all nodes.
    """
    ranks = Ranks.current()
    shared = ranks.broadcast(tempfile.mkdtemp(prefix="recalign-check-", dir=folder) if ranks.is_first else None)
    place = Path(shared)
    try:
        found = probe.facts()
        found["sees_the_folder"] = probe.rename_visible_s(place, ranks)
        if all(ranks.gather(found["sees_the_folder"] is not None)):
            found["locks_reach"] = probe.locks_reach(place, ranks)
            found["write_mb_per_s"] = probe.write_mb_per_s(place, ranks)
        found["skew_s"] = probe.clock_skews_s(ranks)[ranks.rank]
        found["all_reduce_gb_per_s"] = probe.all_reduce_gb_per_s(ranks)
        everybody = ranks.gather(found)
    finally:
        ranks.barrier()
        if ranks.is_first:
            shutil.rmtree(place, ignore_errors=True)
    return everybody if ranks.is_first else None


def judge(found: list[dict[str, Any]], folder: Path) -> Iterator[Result]:
    """What the measurements mean."""
    hosts = list(Counter(one["host"] for one in found))
    yield Result("ranks", f"{len(found)} on {', '.join(hosts)}", True)
    yield from _judge_network(found, len(hosts))
    yield from _judge_folder(found, folder)
    worst = max(abs(one["skew_s"]) for one in found)
    yield Result("clocks", f"at most {worst:.3f} s apart", worst <= MAX_SKEW_S)
    yield from _judge_software(found)


def _judge_network(found: list[dict[str, Any]], hosts: int) -> Iterator[Result]:
    addresses = sorted({str(one["address"]) for one in found})
    usable = hosts == 1 or not any(address == "None" or address.startswith("127.") for address in addresses)
    yield Result("addresses", ", ".join(addresses), usable)
    speed = found[0]["all_reduce_gb_per_s"]
    if speed is not None:
        yield Result("all-reduce", f"{speed:.2f} GB/s", hosts == 1 or speed >= SLOW_ALL_REDUCE_GB_PER_S)


def _judge_folder(found: list[dict[str, Any]], folder: Path) -> Iterator[Result]:
    blind = [one["host"] for one in found if one["sees_the_folder"] is None]
    if blind:
        yield Result("shared folder", f"{folder} is not seen on {', '.join(blind)}", False)
        return
    slowest = max(one["sees_the_folder"] for one in found)
    yield Result("rename", f"seen everywhere within {slowest:.2f} s", slowest <= SLOW_RENAME_S)
    reach = all(one["locks_reach"] for one in found)
    yield Result("locks", "reach every node" if reach else "do not reach every node", reach)
    speed = min(one["write_mb_per_s"] for one in found)
    yield Result("writing", f"{speed:,.0f} MB/s on each node at once", speed >= SLOW_WRITE_MB_PER_S)


def _judge_software(found: list[dict[str, Any]]) -> Iterator[Result]:
    first = found[0]
    for key in ("python", "versions", "gpus"):
        others = [one["host"] for one in found if one[key] != first[key]]
        differ = f"differ between {first['host']} and {', '.join(others)}"
        yield Result(key, differ if others else _brief(first[key]), not others)
    wrong = set()
    for pin in probe.pins():
        version = first["versions"].get(pin.name)
        if pin.name in first["versions"] and (version is None or not pin.specifier.contains(version, prereleases=True)):
            wrong.add(f"{pin.name} {version or 'missing'}, tested with {pin.specifier}")
    yield Result("pins", "; ".join(sorted(wrong)) or "as tested", not wrong)


def _brief(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items() if version)
    if isinstance(value, list):
        return ", ".join(f"{n} x {name}" for name, n in Counter(value).items()) or "none"
    return str(value)


def _join_group() -> None:
    """From SLURM's variables or a launcher's; one process alone joins none."""
    environment = os.environ
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", "1")) > 1 and "MASTER_ADDR" in environment:
        environment |= {"RANK": environment["SLURM_PROCID"], "WORLD_SIZE": environment["SLURM_NTASKS"]}
    if int(environment.get("WORLD_SIZE", "1")) > 1:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(environment.get("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))))
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout())


def main() -> None:
    """Entry of every rank; rank 0 prints, and ends with exit code 1 if there is something to mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(), help="where runs are to live")
    folder = parser.parse_args().folder.absolute()
    with lost_contact_is_named():
        _join_group()
    with lost_contact_is_named(), left_together():
        found = measure(folder)
        results = list(judge(found, folder)) if found else []
        for result in results:
            sys.stdout.write(f"{'ok  ' if result.fine else 'MEND'}  {result.name}: {result.found}\n")
            if not result.fine:
                sys.stdout.write(f"      {REMEDIES[result.name]}\n")
    if not all(result.fine for result in results):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main)
