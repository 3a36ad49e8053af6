"""Other toolkits, each in an environment of its own, and the adapters that run in them.

``python -m launch.bench.peers --setup`` makes the environments; ``run`` starts an adapter there and returns its result.
An environment lies in ``.venv-peers/NAME`` beside this one unless told otherwise, and is ready when it holds a file
with the requirements that it was made from.
"""

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec.runtime import files
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.parent import die_with_parent

log = logging.getLogger(__name__)

ADAPTERS = Path(__file__).with_name("adapters")
READY = "requirements.txt"
TORCH, PYARROW = "torch==2.13.0", "pyarrow==23.0.1"
# What every process of recalign sets for itself (rec.runtime.logs, rec.runtime.memory), so that toolkits are compared
# and not how two processes share a core or how the C library hands memory back.
LIKE_OURS = {
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True)
class Peer:
    """Another toolkit.

    Attributes:
        title: as its authors write it.
        requirements: what its environment is made of.
        adapters: scripts of ``launch/bench/adapters`` that it can run, by what they do.
    """

    title: str
    requirements: tuple[str, ...]
    adapters: dict[str, str]


PEERS = {
    # RecBole 1.2.1 uses numpy.float, a scipy internal and pandas' chained assignment: these are the last versions
    # that have all three, so that nothing of it needs to be patched.
    "recbole": Peer(
        "RecBole 1.2.1",
        (
            "recbole==1.2.1",
            TORCH,
            "numpy==1.23.5",
            "pandas==1.5.3",
            "scipy==1.10.1",
            PYARROW,
            "setuptools<80",
        ),
        {"sasrec": "recbole_sasrec.py", "metrics": "recbole_metrics.py"},
    ),
    "rectools": Peer(
        "RecTools 0.19.0",
        ("rectools[torch]==0.19.0", TORCH, PYARROW),
        {"sasrec": "rectools_sasrec.py"},
    ),
    "replay": Peer(
        "RePlay 0.22.0",
        ("replay-rec[torch]==0.22.0", TORCH, PYARROW),
        {"sasrec": "replay_sasrec.py"},
    ),
}


def default_root() -> Path:
    """The folder of all peers' environments: beside this environment, or in the working folder if there is none."""
    inside = sys.prefix != sys.base_prefix
    return (Path(sys.prefix).parent if inside else Path.cwd()) / ".venv-peers"


def is_ready(name: str, root: Path | None = None) -> bool:
    """Whether the peer's environment is there and made from today's requirements."""
    marker = (root or default_root()) / name / READY
    return marker.is_file() and marker.read_text(encoding="utf-8") == _lines(name)


def setup(names: Sequence[str] = (), root: Path | None = None) -> None:
    """Make the environments of ``names`` (all by default); one that is ready stays as it is.

    Raises:
        UserError: if a name is unknown, there is no uv, or a package cannot be had.
    """
    root = root or default_root()
    for name in names:
        require_known(name)
    for name in names or PEERS:
        if is_ready(name, root):
            log.info("%s is ready in %s", PEERS[name].title, root / name)
            continue
        log.info("installing %s into %s ...", PEERS[name].title, root / name)
        _uv("venv", "--quiet", "--clear", "--python", sys.executable, str(root / name))
        _install(name, root)
        files.write_text(root / name / READY, _lines(name))


def run(
    name: str,
    adapter: str,
    arguments: Sequence[str],
    root: Path | None = None,
    threads: int = 2,
    timeout_s: float | None = None,
    like_ours: bool = True,
) -> dict[str, Any]:
    """Run one of a peer's adapters in its environment.

    Args:
        name: of the peer.
        adapter: what it is to do, a key of the peer's ``adapters``.
        arguments: the script's command line.
        root: where the environments are.
        threads: of numerical libraries.
        timeout_s: end it after that many seconds.
        like_ours: with the OpenMP and memory settings that recalign's own processes have; otherwise as installed.

    Returns:
        The result that it prints as its last line.

    Raises:
        UserError: if the environment is not ready, or the adapter fails or takes too long; the message ends with what
            it last said.
    """
    root = root or default_root()
    require_known(name)
    if not is_ready(name, root):
        raise UserError(
            f"no environment for {PEERS[name].title} in {root / name}; make it with:"
            f" python -m launch.bench.peers --setup {name}" + ("" if root == default_root() else f" --root {root}")
        )
    script = ADAPTERS / PEERS[name].adapters[adapter]
    # -s and no PYTHONPATH: nothing of this environment or the user's leaks into the peer's.
    command = [str(root / name / "bin" / "python"), "-s", str(script), *arguments]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    environment |= LIKE_OURS if like_ours else {}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=timeout_s, preexec_fn=die_with_parent
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{PEERS[name].title}: {script.name} did not end within {timeout_s:g} s") from error
    said = [line for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not said:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{PEERS[name].title}: {script.name} failed (exit code {done.returncode}): {last}")
    return json.loads(said[-1])


def require_known(name: str) -> None:
    """Raise a UserError that lists them all if there is no such peer."""
    if name not in PEERS:
        raise UserError(f"unknown peer {name!r}; there are: {', '.join(PEERS)}")


def _lines(name: str) -> str:
    return "\n".join(PEERS[name].requirements) + "\n"


def _install(name: str, root: Path) -> None:
    """Install the requirements, with the small CPU build of torch where it can be had."""
    target = ("pip", "install", "--quiet", "--python", str(root / name / "bin" / "python"))
    if _from_pip("global.find-links"):
        _uv(*target, *PEERS[name].requirements)
        return
    try:
        _uv(*target, "--torch-backend", "cpu", *PEERS[name].requirements)
    except UserError:
        # PyTorch's own index may be out of reach; the registry's large build works too.
        _uv(*target, *PEERS[name].requirements)


def _uv(*arguments: str) -> None:
    beside = Path(sys.executable).with_name("uv")
    program = str(beside) if beside.exists() else shutil.which("uv")
    if program is None:
        raise UserError("there is no uv to install peers with; 'make setup' installs it, or: pip install uv")
    # uv does not read pip's configuration: hand it a local folder of wheels and a private index, if pip has them.
    environment = dict(os.environ)
    if links := _from_pip("global.find-links"):
        environment.setdefault("UV_FIND_LINKS", ",".join(links.split()))
    if index := _from_pip("global.index-url"):
        environment.setdefault("UV_DEFAULT_INDEX", index)
    done = subprocess.run([program, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"uv {arguments[0]} failed: {reason}")


def _from_pip(key: str) -> str:
    command = [sys.executable, "-m", "pip", "config", "get", key]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Make environments, or say which are ready."""
    parser = argparse.ArgumentParser(prog="python -m launch.bench.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--setup", nargs="*", metavar="NAME", help=f"make environments: {', '.join(PEERS)}, or all")
    parser.add_argument("--root", type=Path, default=default_root(), help="where they are (default: %(default)s)")
    parser.add_argument("--record-metrics", type=Path, metavar="FILE", help="write what RecBole's evaluator says")
    arguments = parser.parse_args()
    if arguments.setup is not None:
        setup(arguments.setup, arguments.root)
        return
    if arguments.record_metrics:
        run("recbole", "metrics", ["--out", str(arguments.record_metrics)], arguments.root)
        return
    for name, peer in PEERS.items():
        log.info("%s: %s", peer.title, "ready" if is_ready(name, arguments.root) else "not installed")


if __name__ == "__main__":
    run_main(main)
