"""The LLM's weights from the trainer's memory into the generator's, without a file: ``align.weights`` of gloo or nccl.

The trainer's first rank keeps the weights of its newest snapshot in host memory, where they were gathered for it, and a
store that generators find by ``RUN/exchange.json``. A generator that wants them counts itself up in the store. Between
two steps, and while it waits for samples, the trainer looks at the count and makes a process group with whoever is new:
of two, for this one transfer. No group outlives it, so nothing has to be mended when a process dies. Whoever is left
alone in one gives up in time: the trainer goes on, the generator asks again. (With NCCL that holds until both have met;
after that its watchdog ends whoever is left, who is started again.)

A generator loads nothing before everything has come, and the canary of the snapshot is scored as it is after a file.
"""

import ipaddress
import json
import logging
import os
import socket
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from rec.runtime import files
from rec.runtime.errors import UserError

log = logging.getLogger(__name__)

Backend = Literal["gloo", "nccl"]
GENERATOR_MISSES_S = 60
"""How long the trainer waits for a generator that has asked, and may have died since."""
ANSWERS_WITHIN = timedelta(seconds=5)
HELD, ASKED, WHAT = "held", "asked", "what"


class TransferFailed(Exception):
    """The other side has gone, or did not come in time."""


def require_devices(backend: str) -> None:
    """Raise a UserError if a transfer by ``backend`` needs a GPU that this process has not."""
    if backend == "nccl" and not torch.cuda.is_available():
        raise UserError(
            "align.weights=nccl needs a GPU for the trainer and another one for the generator; gloo needs none"
        )


class Giver:
    """The trainer's side, on its first rank.

    Args:
        place: ``exchange.json``, by which generators find this process.
        backend: how tensors travel.
    """

    def __init__(self, place: Path, backend: Backend) -> None:
        require_devices(backend)
        self.backend, self.given = backend, 0
        self.version, self.weights = -1, {}
        address = os.environ.get("MASTER_ADDR", "127.0.0.1")
        # Bound here: a store that makes its own socket listens on every interface.
        listening = socket.create_server((address, 0), family=_family(address))
        port = listening.getsockname()[1]
        self.store = dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        self.store.set(HELD, "-1")
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(place, {"address": address, "port": port, "host": socket.gethostname()})

    def hold(self, version: int, weights: Mapping[str, Tensor]) -> None:
        """From now on give these weights, of a snapshot that is published already."""
        self.version, self.weights = version, weights
        self.store.set(HELD, str(version))

    def serve(self) -> list[dict[str, float]]:
        """Give the weights to every generator that has asked for them; the version, bytes and seconds of each time."""
        done = []
        while self.given < self.store.add(ASKED, 0):
            self.given += 1
            begin = time.monotonic()
            try:
                self._give(self.given)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # torch's connection errors are its subclasses
                log.warning("a generator that had asked for weights has gone: %s", _line(error))
                continue
            size = sum(tensor.nbytes for tensor in self.weights.values())
            done.append({"version": self.version, "bytes": size, "give_s": round(time.monotonic() - begin, 4)})
        return done

    def _give(self, number: int) -> None:
        store, device = dist.PrefixStore(str(number), self.store), _device(self.backend)
        tensors = [
            [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for name, tensor in self.weights.items()
        ]
        store.set(WHAT, json.dumps([self.version, tensors]))
        group = _group(self.backend, store, 0, GENERATOR_MISSES_S)
        for tensor in self.weights.values():
            group.broadcast(tensor.to(device).contiguous(), root=0).wait()
        if self.backend == "nccl":
            torch.cuda.synchronize()
        group.shutdown()


class Taker:
    """A generator's side.

    Args:
        place: the trainer's ``exchange.json``.
        backend: how tensors travel.
        timeout_s: longest wait for a trainer that is in the middle of a step.
    """

    def __init__(self, place: Path, backend: Backend, timeout_s: float) -> None:
        require_devices(backend)
        self.place, self.backend, self.timeout_s = place, backend, timeout_s
        self.store: dist.TCPStore | None = None

    def held(self) -> int:
        """The version of the snapshot whose weights the trainer would give; -1 if it gives none, or there is none."""
        try:
            if self.store is None:
                at = files.read_json(self.place)
                self._require_reachable(at["address"], at["host"])
                # A trainer that has died leaves its file; its successor, a minute later, another one.
                self.store = dist.TCPStore(at["address"], at["port"], timeout=ANSWERS_WITHIN, wait_for_workers=False)
            return int(self.store.get(HELD))
        except (OSError, RuntimeError):
            self.store = None
            return -1

    def _require_reachable(self, address: str, host: str) -> None:
        """Raise a UserError if the trainer is on another machine and its address means this one."""
        if host != socket.gethostname() and _is_loopback(address):
            raise UserError(
                f"the trainer on {host} listens at {address}, where only {host} itself finds it: set RECALIGN_INTERFACE"
                " in site.sh, or MASTER_ADDR, to what the network has; or align.weights=files"
            )

    def take(self) -> tuple[int, dict[str, Tensor]]:
        """The version and all weights, in host memory.

        Raises:
            TransferFailed: if the trainer ends or does not come in time.
        """
        if self.store is None:
            raise TransferFailed("no trainer gives weights")
        try:
            store = dist.PrefixStore(str(self.store.add(ASKED, 1)), self.store)
            store.set_timeout(timedelta(seconds=self.timeout_s))
            version, tensors = json.loads(store.get(WHAT))
            group, found, device = _group(self.backend, store, 1, self.timeout_s), {}, _device(self.backend)
            for name, dtype, shape in tensors:
                tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
                group.broadcast(tensor, root=0).wait()
                found[name] = tensor.cpu()
            group.shutdown()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.store = None
            raise TransferFailed(f"the trainer has gone in the middle of a transfer: {_line(error)}") from error
        # The view of it above has set the patience of both.
        self.store.set_timeout(ANSWERS_WITHIN)
        return version, found


def _group(backend: Backend, store: dist.Store, rank: int, timeout_s: float) -> dist.ProcessGroupGloo:
    """The trainer, rank 0, and one generator."""
    timeout = timedelta(seconds=timeout_s)
    if backend == "gloo":
        return dist.ProcessGroupGloo(store, rank, 2, timeout)
    # NCCL connects in its first broadcast, and would wait for a peer that has gone as long as it takes.
    store.set(f"here-{rank}", "")
    store.wait([f"here-{1 - rank}"], timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, rank, 2, options)


def _device(backend: Backend) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else torch.device("cpu")


def _family(address: str) -> socket.AddressFamily:
    return socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(socket.getaddrinfo(address, None)[0][4][0]).is_loopback


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
