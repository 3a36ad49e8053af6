"""Evaluate finished runs under named protocols, in one pass over the scores, and compare two runs user by user."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from rec.breakdown import break_down
from rec.compare import compare
from rec.evaluation import Metrics, Part, evaluate_many
from rec.job import FinishedRun
from rec.protocol import Protocol
from rec.runtime import files
from rec.runtime.errors import UserError

FOLDER = "evaluations"


def evaluate_run(run: FinishedRun, protocols: Mapping[str, Protocol], part: Part = "test") -> dict[str, Metrics]:
    """Rank under every protocol, and keep what was found in the run folder.

    ``evaluations/PROTOCOL-PART.parquet`` has the rank of every user's held-out item, ``evaluations/PROTOCOL-PART.json``
    the protocol, its hash, the figures, and the figures by kind of target and history.

    Raises:
        UserError: if a cutoff is larger than the catalog, or the model was trained on what it would rank.
    """
    found = rank_run(run, protocols, part)
    trained_on = run.facts.get("trained_on", "train")
    for name, metrics in found.items():
        protocol = protocols[name]
        folder = run.path / FOLDER
        folder.mkdir(exist_ok=True)
        parquet.write_table(_ranks(run, part, metrics), folder / f"{name}-{part}.parquet")
        content = {
            "protocol": protocol.described(),
            "name": name,
            "part": part,
            "model": run.model.architecture,
            "trained_on": trained_on,
            "remarks": remarks(run, protocol),
            "instances": len(metrics.ranks),
            "metrics": metrics.summary(),
            "groups": break_down(metrics, run.data, part, trained_on),
        }
        files.write_json(folder / f"{name}-{part}.json", content)
    return found


def rank_run(run: FinishedRun, protocols: Mapping[str, Protocol], part: Part = "test") -> dict[str, Metrics]:
    """Rank under every protocol, in one pass, and write nothing; raises as ``evaluate_run`` does."""
    trained_on = run.facts.get("trained_on", "train")
    if part == "valid" and trained_on != "train":
        raise UserError(f"{run.path} was trained on its validation items: figures on them say nothing")
    for name, protocol in protocols.items():
        if max(protocol.cutoffs) > run.data.n_items:
            raise UserError(
                f"protocol {name!r} asks for the best {max(protocol.cutoffs)} of {run.data.n_items} items; use smaller"
                " cutoffs"
            )
    size = run.rec.evaluate.batch_size
    return evaluate_many(run.model, run.data, part, protocols, size, trained_on=trained_on)


def compare_runs(
    one: FinishedRun, other: FinishedRun, protocols: Mapping[str, Protocol], part: Part = "test"
) -> dict[str, dict[str, Any]]:
    """The paired bootstrap of two runs under every protocol.

    Raises:
        UserError: if they were not trained on the same prepared data.
    """
    hashes = [run.data.meta["content_hash"] for run in (one, other)]
    if hashes[0] != hashes[1]:
        raise UserError(
            f"{one.path} and {other.path} were trained on different data ({hashes[0]}, {hashes[1]}): their users"
            " cannot be paired"
        )
    ones, others = (rank_run(run, protocols, part) for run in (one, other))
    return {name: compare(ones[name], others[name]) for name in protocols}


def remarks(run: FinishedRun, protocol: Protocol) -> list[str]:
    """How the run differs from what the protocol is meant for; its figures are then not that protocol's."""
    found = []
    split = run.data.meta["filters"].get("split", "leave-one-out")
    if protocol.split not in (None, split):
        found.append(f"meant for a {protocol.split} split, the data has {split}")
    trained_on = run.facts.get("trained_on", "train")
    if protocol.trained_on not in (None, trained_on):
        found.append(f"meant for models trained on {protocol.trained_on}, this one was on {trained_on}")
    if protocol.candidates == "sampled":
        found.append("sampled candidates: not comparable with full ranking, and may order models differently")
    return found


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
