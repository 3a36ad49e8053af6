"""``recalign bench recformer``: useful tokens a second of stage-PT, beside the authors' four padded passes.

These are of micro-batches of 16 as in the authors' code; and of the whole batch, which pads more.

Same model, data, batches, precision and process; what differs is how the encoder's work is cut up. The ways take turns,
round by round, so that all of them meet the same machine.
"""

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.bench.machine import machine
from llm.recformer.engine import make_accelerator
from llm.recformer.job import RecformerJob, load_job
from llm.recformer.pretrain import Pretraining
from rec.runtime.config import apply_overrides, build, hash_of
from rec.runtime.errors import UserError
from rec.runtime.runfolder import RunFolder

LEAST_SPEEDUP = 1.5
OFFICIAL, WHOLE = "four padded passes of 16", "four padded passes of the batch"
WAYS = {
    "recalign": {"by_length": True, "shared_pass": True},
    "by length alone": {"by_length": True, "shared_pass": False},
    "shared passes alone": {"by_length": False, "shared_pass": True},
    # A history and a next item, each once for the contrast and once masked, padded to the longest.
    OFFICIAL: {"by_length": False, "shared_pass": False, "micro_batch": 16},
    WHOLE: {"by_length": False, "shared_pass": False, "micro_batch": 10**6},
}


def run(recipe: Path, overrides: Sequence[str], steps: int, rounds: int, out: Path, command: str) -> dict[str, Any]:
    """Measure, and write ``result.json``.

    Args:
        recipe: with an ``llm.recformer.pretrain`` section.
        overrides: of its keys.
        steps: timed a round and way; the same batches for all ways.
        rounds: how often each way has its turn.
        out: folder of the result.
        command: what the user typed.

    Raises:
        UserError: if the recipe has no stage-PT.
    """
    job, begin, folder = load_job(recipe, overrides), time.monotonic(), RunFolder(out)
    if job.settings.pretrain is None:
        raise UserError(f"{recipe} has no llm.recformer.pretrain section")
    with folder.lock("bench"):
        accelerator = make_accelerator(job.settings, job.settings.pretrain)
        ways = {name: Pretraining(_job(job, out, name), accelerator) for name in WAYS}
        for stage in ways.values():
            stage._step(0)  # in which kernels are made
        found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        for number, (name, stage) in itertools.product(range(rounds), ways.items()):
            found[name] += [stage._step(1 + (number * steps + step) % max(1, stage.total - 1)) for step in range(steps)]
        rows = [{"way": name, **_summary(own)} for name, own in found.items()]
        rates = {row["way"]: row["tokens_per_s"] for row in rows}
        speedup = rates["recalign"] / rates[OFFICIAL]
        claim = {
            "id": "stage-PT is at least 1.5 times as fast as four padded passes a step",
            "holds": speedup >= LEAST_SPEEDUP,
            "figure": round(speedup, 3),
        }
        return folder.write_result(
            command,
            hash_of([job.identity("pretrain"), steps, rounds]),
            {},
            rows,
            time.monotonic() - begin,
            [claim],
            machine=machine(),
        )


def _job(job: RecformerJob, out: Path, name: str) -> RecformerJob:
    changes = [f"llm.recformer.pretrain.{key}={str(value).lower()}" for key, value in WAYS[name].items()]
    content = apply_overrides(job.model_dump(mode="json"), changes)
    content |= {"run": str(out / name.replace(" ", "-"))}
    return build(RecformerJob, content)


def _summary(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    tokens, places, seconds = (sum(step[name] for step in steps) for name in ("tokens", "places", "seconds"))
    return {
        "tokens_per_s": round(tokens / seconds, 1),
        "places_per_token": round(places / tokens, 3),
        "seconds_per_step": round(seconds / len(steps), 3),
        "steps": len(steps),
    }
