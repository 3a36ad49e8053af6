"""``recalign bench rec``: recalign's recommenders beside RecBole, RecTools and RePlay, in one run on one machine.

Stages, each a file in the output folder, so that an interrupted run goes on where it was:

- ``epoch``: seconds of a SASRec training epoch with the exact full softmax, in both precisions, and with sampled
  negatives where a peer has them. The peers train on each user's last window, ours does the same.
- ``models``: seconds of an epoch of every sequence model, and its ratio to SASRec's.
- ``evaluation``: seconds to rank all items for every user.
- ``convergence``: SASRec until early stopping; training seconds until validation NDCG@10 is within 1 % of its best, and
  for a peer's ratio, our seconds until we are within 1 % of the peer's best.
- ``floor``: the time of the matrix products alone.
- ``quality``: every model, and every peer's SASRec, trained with three seeds until early stopping (peers for half an
  hour at most): test figures as mean and standard error over seeds. Hours, so only on request.
"""

import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench import peers
from launch.bench.child import TIMEOUT_S, last_line
from launch.bench.machine import processor
from launch.bench.rec_rows import claims_of, rows_of
from launch.bench.rec_tasks import Settings, Task, tasks
from rec.runtime import files
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

log = logging.getLogger(__name__)


def run(settings: Settings, out: Path, command: str) -> dict[str, Any]:
    """Measure everything that is not measured yet, and write ``result.json``.

    Raises:
        UserError: before anything is measured, if a peer's environment or a data folder is not there.
    """
    for name in settings.names:
        peers.require_known(name)
    for name in settings.names:
        if not peers.is_ready(name, settings.root):
            setup = f"python -m launch.bench.peers --setup {' '.join(settings.names)}"
            raise UserError(f"no environment for {name}; make it with: {setup}")
    names = [folder.name for folder in settings.data]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two folders are called {twice[0]!r}: their rows could not be told apart; rename one")
    for folder in settings.data:
        if not (folder / "interactions.parquet").is_file():
            raise UserError(f"{folder} is no prepared folder; make one with 'recalign prepare'")
    began, folder = time.monotonic(), RunFolder(out)
    with folder.lock("bench"):
        measured = [{"stage": task.stage, **_once(task, out / "measured", settings)} for task in tasks(settings)]
        rows = rows_of(measured)
        return folder.write_result(
            command,
            "",
            {},
            rows,
            time.monotonic() - began,
            claims=claims_of(rows),
            machine={"processor": processor(), "cores": os.cpu_count(), "load_average": os.getloadavg()},
        )


def _once(task: Task, folder: Path, settings: Settings) -> dict[str, Any]:
    """The measurement's result, from its file if the same was measured before.

    A peer that fails, or takes too long, leaves a row that says so; the next call tries it again.
    """
    place = task.arguments.index("--data") + 1
    data = Path(task.arguments[place])
    path = folder / f"{task.stage}-{data.name}-{task.name}.json"
    # Of what the data is, wherever it lies: measurements go on on another machine of the same kind too.
    content = files.read_json(data / "meta.json")["content_hash"]
    needed = peers.PEERS[task.peer].requirements if task.peer in peers.PEERS else ()
    asked = hash_of([*task.arguments[:place], content, *task.arguments[place + 1 :], processor(), *needed])
    if path.is_file() and (before := files.read_json(path)).get("asked") == asked:
        return before
    log.info("%s: %s on %s", task.stage, task.name, data.name)
    began = time.monotonic()
    try:
        if task.peer == "recalign":
            found = _ours(task.arguments)
        else:
            found = peers.run(task.peer, "sasrec", task.arguments, settings.root, timeout_s=TIMEOUT_S)
    except UserError as error:
        log.warning("%s", error)
        return {"name": task.name, "peer": task.peer, "data": data.name, "failed": str(error)}
    found = {"name": task.name, **found, "wall_s": round(time.monotonic() - began, 1), "asked": asked}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, found)
    return found


def _ours(arguments: Sequence[str]) -> dict[str, Any]:
    """One measurement of ours, on the processor and with the threads that peers have."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    try:
        return json.loads(last_line(["-m", "launch.bench.ours", *arguments], environment))
    except RuntimeError as error:
        raise UserError(str(error)) from error
