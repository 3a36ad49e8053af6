"""Evaluate finished runs under named protocols, in one pass over the scores, and compare two runs user by user."""

import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from rec.batches import fit_users
from rec.breakdown import break_down
from rec.compare import compare, paired
from rec.evaluation import Metrics, evaluate_many, require_cutoffs
from rec.job import FinishedRun
from rec.protocol import Part, Protocol
from rec.runtime import files
from rec.runtime.arrow_files import write_table
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder
from rec.trainer import device

FOLDER = "evaluations"


def evaluate_run(
    run: FinishedRun, protocols: Mapping[str, Protocol], part: Part = "test", command: str = ""
) -> dict[str, Metrics]:
    """Rank under every protocol, and keep what was found in the run folder.

    ``evaluations/PROTOCOL-PART.parquet`` has the rank of every user's held-out item, ``evaluations/PROTOCOL-PART.json``
    the protocol, its hash, the figures, and the figures by kind of target and history. ``evaluations/result.json`` is
    this call's result; the run's own stays what training wrote.

    Raises:
        UserError: if a cutoff is larger than the catalog, or the model was trained on what it would rank.
    """
    began, folder = time.monotonic(), RunFolder(run.path / FOLDER)
    found, rows = rank_run(run, protocols, part), []
    for name, metrics in found.items():
        write_table(folder.path / f"{name}-{part}.parquet", _ranks(run, part, metrics))
        own = _described(run, protocols[name])
        content = {
            "protocol": own,
            "name": name,
            "part": part,
            "model": run.model.architecture,
            "trained_on": run.trained_on,
            "remarks": remarks(run, protocols[name], part),
            "instances": len(metrics.ranks),
            "metrics": metrics.summary(),
            "groups": break_down(metrics, run.data, part, run.trained_on),
        }
        files.write_json(folder.path / f"{name}-{part}.json", content)
        told = {key: content[key] for key in ("model", "trained_on", "part", "instances")}
        rows.append({**told, "protocol": name, "protocol_hash": own["hash"], **content["metrics"]})
    _conclude(folder, run, protocols, rows, command, began)
    return found


def rank_run(run: FinishedRun, protocols: Mapping[str, Protocol], part: Part = "test") -> dict[str, Metrics]:
    """Rank under every protocol, in one pass, and write nothing; raises as ``evaluate_run`` does."""
    if part == "valid" and run.trained_on != "train":
        raise UserError(f"{run.path} was trained on its validation items: figures on them say nothing")
    for name, protocol in protocols.items():
        require_cutoffs(protocol, run.data, f"protocol {name!r}")
    run.model.to(device())
    size = run.rec.evaluate.batch_size
    return evaluate_many(run.model, run.data, part, protocols, size, trained_on=run.trained_on)


def compare_runs(
    one: FinishedRun, other: FinishedRun, protocols: Mapping[str, Protocol], part: Part = "test", command: str = ""
) -> dict[str, dict[str, Any]]:
    """The paired bootstrap of two runs under every protocol.

    ``evaluations/against-RUN-HASH/result.json`` in the first one's folder holds it too, HASH being of where RUN lies.

    Returns:
        For each protocol ``instances``, that were compared, ``left_out``, those that count for one run alone (targets
        that are cold for one of them), and ``metrics``, what ``compare`` finds.

    Raises:
        UserError: if they were not trained on the same prepared data, or share no instance.
    """
    began, hashes = time.monotonic(), [run.data.meta["content_hash"] for run in (one, other)]
    if hashes[0] != hashes[1]:
        raise UserError(
            f"{one.path} and {other.path} were trained on different data ({hashes[0]}, {hashes[1]}): their users"
            " cannot be paired"
        )
    ones, others = (rank_run(run, protocols, part) for run in (one, other))
    found, rows = {}, []
    for name in protocols:
        shared = len(paired(ones[name], others[name])[0].ranks)
        left_out = len(ones[name].ranks) + len(others[name].ranks) - 2 * shared
        found[name] = {
            "instances": shared,
            "left_out": left_out,
            "metrics": compare(ones[name], others[name]),
        }
        described = [_described(run, protocols[name])["hash"] for run in (one, other)]
        told = {"protocol": name, "protocol_hash": described[0], "against_protocol_hash": described[1], "part": part}
        told |= {"instances": shared, "left_out": left_out}
        rows += [{**told, "metric": metric, **row} for metric, row in found[name]["metrics"].items()]
    against = other.path.resolve()
    folder = RunFolder(one.path / FOLDER / f"against-{against.name}-{hash_of(str(against))[:8]}")
    _conclude(folder, one, protocols, rows, command, began, against=str(other.path))
    return found


def remarks(run: FinishedRun, protocol: Protocol, part: Part) -> list[str]:
    """How the run differs from what the protocol is meant for; its figures are then not that protocol's."""
    found, own = [], protocol.of_run(run.data, run.trained_on)
    if protocol.split not in (None, own.split):
        found.append(f"meant for a {protocol.split} split, the data has {own.split}")
    if protocol.trained_on not in (None, own.trained_on):
        found.append(f"meant for models trained on {protocol.trained_on}, this one was on {own.trained_on}")
    if protocol.candidates == "sampled":
        found.append("sampled candidates: not comparable with full ranking, and may order models differently")
    if run.model.samples == "pairs":
        found += _remarks_of_pairs(run, protocol, part)
    return found


def _remarks_of_pairs(run: FinishedRun, protocol: Protocol, part: Part) -> list[str]:
    """Of a model that knows users by number alone."""
    found, users = [], run.data.instances(part)[0].unique()
    strangers = int((~fit_users(run.data, run.trained_on)[users]).sum())
    if strangers:
        found.append(f"{strangers} of {len(users)} users are not trained on: their lists are noise")
    if protocol.candidates == "all" and protocol.seen == "rank":
        found.append("seen items are ranked, which such a model has learnt to put first: RecBole leaves them out here")
    return found


def _described(run: FinishedRun, protocol: Protocol) -> dict[str, Any]:
    return protocol.of_run(run.data, run.trained_on).described()


def _conclude(
    folder: RunFolder,
    run: FinishedRun,
    protocols: Mapping[str, Protocol],
    rows: list[dict[str, Any]],
    command: str,
    began: float,
    **more: Any,
) -> None:
    described = {name: _described(run, protocol) for name, protocol in protocols.items()}
    several = {"hash": hash_of([own["hash"] for own in described.values()]), **described}
    folder.write_result(
        command,
        hash_of(run.rec),
        several if len(described) > 1 else next(iter(described.values())),
        rows,
        time.monotonic() - began,
        data={"name": str(run.data.folder), "content_hash": run.data.meta["content_hash"], **run.data.meta["counts"]},
        **more,
    )


def _ranks(run: FinishedRun, part: Part, metrics: Metrics) -> pa.Table:
    users, ends = (values[metrics.instances] for values in run.data.instances(part))
    targets = run.data.sequence[ends]
    user_ids, item_ids = pa.array(run.data.user_ids), run.data.items["item_id"]
    return pa.table(
        {
            "user_id": user_ids.take(pa.array(users.numpy())),
            "item_id": item_ids.take(pa.array((targets - 1).numpy())),
            "rank": metrics.ranks.numpy(),
        }
    )
