"""Weights from memory to memory: what arrives, and who gives up when the other side dies."""

import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch

from align import transfer
from align.transfer import Giver, Taker, TransferFailed, require_devices
from rec.runtime.errors import UserError

WEIGHTS = {
    "wte": torch.randn(500, 30),
    "half": torch.randn(7, 3).to(torch.bfloat16),
    "transposed": torch.randn(20, 10).T,
    "one": torch.tensor(2.5),
    "counts": torch.arange(5),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setattr(transfer, "GENERATOR_MISSES_S", 2)
    return tmp_path / "run" / "exchange.json"


def serve(giver: Giver, until: threading.Event) -> list[dict]:
    rows = []
    while not until.is_set():
        rows += giver.serve()
        time.sleep(0.01)
    return rows


def in_another_process(function, *arguments) -> multiprocessing.Process:
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def take_and_keep(place: Path, times: int, out: Path) -> None:
    taker = Taker(place, "gloo", 60)
    for number in range(times):
        while taker.held() < number:
            time.sleep(0.01)
        torch.save(taker.take(), out / f"{number}.pt")


def take_and_die(place: Path) -> None:
    taker = Taker(place, "gloo", 60)
    while taker.held() < 0:
        time.sleep(0.01)
    taker.store.add(transfer.ASKED, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def promise_and_die(place: Path) -> None:
    giver = Giver(place, "gloo")
    giver.hold(0, WEIGHTS)
    while not giver.store.add(transfer.ASKED, 0):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.distributed
def test_every_version_arrives_bit_for_bit_and_one_that_died_is_not_waited_for(place, tmp_path):
    giver = Giver(place, "gloo")
    first, second = WEIGHTS, {name: tensor + 1 for name, tensor in WEIGHTS.items()}
    giver.hold(0, first)
    dead = in_another_process(take_and_die, place)
    dead.join(120)
    assert giver.serve() == []  # it had asked, and is gone
    alive, rows = in_another_process(take_and_keep, place, 2, tmp_path), []
    end = time.monotonic() + 120
    while alive.is_alive() and time.monotonic() < end:
        rows += giver.serve()
        if rows and giver.version == 0:
            giver.hold(1, second)
        time.sleep(0.01)
    assert alive.exitcode == 0
    assert [row["version"] for row in rows] == [0, 1]
    assert {row["bytes"] for row in rows} == {sum(tensor.nbytes for tensor in WEIGHTS.values())}
    for number, sent in enumerate((first, second)):
        version, found = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        assert version == number
        assert list(found) == list(sent)
        for name, tensor in sent.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


@pytest.mark.distributed
def test_a_generator_outlives_the_trainer_that_was_to_give_and_takes_from_the_next(place):
    taker = Taker(place, "gloo", 60)
    assert taker.held() == -1  # nobody there yet
    with pytest.raises(TransferFailed, match="no trainer gives weights"):
        taker.take()
    dying = in_another_process(promise_and_die, place)
    while taker.held() < 0:
        time.sleep(0.05)
    with pytest.raises(TransferFailed, match="the trainer has gone in the middle of a transfer"):
        taker.take()
    dying.join(60)
    assert taker.held() == -1
    giver, over = Giver(place, "gloo"), threading.Event()
    giver.hold(4, WEIGHTS)
    serving = threading.Thread(target=serve, args=(giver, over))
    serving.start()
    try:
        assert taker.held() == 4
        version, found = taker.take()
    finally:
        over.set()
        serving.join()
    assert version == 4
    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())


def test_a_trainer_that_is_busy_too_long_is_given_up(place):
    giver = Giver(place, "gloo")
    giver.hold(0, WEIGHTS)
    taker = Taker(place, "gloo", 1)
    assert taker.held() == 0
    with pytest.raises(TransferFailed):
        taker.take()


def test_nobody_is_listened_to_from_elsewhere(place):
    giver = Giver(place, "gloo")
    port = giver.store.port
    elsewhere = socket.gethostbyname(socket.gethostname())
    if elsewhere.startswith("127."):
        pytest.skip("this machine has the loopback address alone")
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection((elsewhere, port), 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_an_address_that_only_the_other_machine_finds_is_named(place):
    Giver(place, "gloo")
    there = json.loads(place.read_text())
    place.write_text(json.dumps(there | {"host": "elsewhere"}))
    with pytest.raises(UserError, match=r"the trainer on elsewhere listens at 127\.0\.0\.1, .* set RECALIGN_INTERFACE"):
        Taker(place, "gloo", 5).held()


def test_nccl_without_a_gpu_is_one_clear_line():
    require_devices("gloo")
    with pytest.raises(UserError, match=r"align\.weights=nccl needs a GPU"):
        require_devices("nccl")
