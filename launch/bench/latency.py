"""``recalign bench latency``: Table 3 of SeRALM, on a finished main job and on this machine.

The recommender answers from vectors that lie ready, so its latency is the ID-based one's plus reading them; writing and
encoding the text of one item takes far longer, and is done before anybody asks.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from align.config import MainJob, Stages, load_job
from align.snapshots import SnapshotStore
from launch.bench.machine import machine
from llm.engine import Engine
from llm.prompts import item_texts, prompt_tokens
from llm.text_encoder import TextEncoder
from llm.text_items import vectors_by
from llm.tokenizer import load_tokenizer
from rec.build import MODEL
from rec.data.prepared import Prepared
from rec.models.base import SequenceRecommender
from rec.runtime.errors import UserError
from rec.runtime.runfolder import CONFIG, RunFolder

K, WARM_UP = 10, 5


def run(source: Path, out: Path, requests: int, command: str) -> dict[str, Any]:
    """Median latency of single requests, one after the other.

    Args:
        source: the run folder of a finished main job.
        out: the folder of the result.
        requests: how many are timed of each kind.
        command: what the user typed; goes into the result.

    Raises:
        UserError: if ``source`` is no finished main job.
    """
    begin = time.monotonic()
    if not (source / CONFIG).is_file() or RunFolder(source).result() is None:
        raise UserError(f"{source} is no finished main job")
    job = load_job(source / CONFIG)
    stages = Stages(job.run)
    data = Prepared.load(stages.data_folder(job.data))
    name = job.rec.model.name
    kinds = {
        f"{name}, IDs alone": _recommend(stages.base, data),
        f"SeRALM_rec: {name} that reads vectors": _recommend(stages.final, data),
        "SeRALM_gen&enc: one item's text and vector": _write_and_encode(job, stages, data),
    }
    rows = [{"what": what, **_timed(answer, requests)} for what, answer in kinds.items()]
    return RunFolder(out).write_result(
        command, job.identity, {}, rows, time.monotonic() - begin, machine=machine(), requests=requests
    )


def _recommend(folder: Path, data: Prepared) -> Callable[[int], Any]:
    """Answers one user's request: the ``K`` best items."""
    model = SequenceRecommender.from_pretrained(folder / MODEL)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)

    @torch.no_grad()
    def answer(request: int) -> list[int]:
        row = request % len(data.targets("test"))
        items, lengths = data.histories("test", [row], model.config.max_length)
        scores = model.score_all(torch.tensor([row], device=device), items.to(device), lengths.to(device))
        return scores.topk(min(K, data.n_items)).indices[0].tolist()

    return answer


def _write_and_encode(job: MainJob, stages: Stages, data: Prepared) -> Callable[[int], Any]:
    """Writes one item's text with the aligned LLM, and encodes it."""
    llm, aligned = job.llm, SnapshotStore(stages.snapshots).newest().llm
    prompts = prompt_tokens(
        item_texts(data.items, llm.item_text), llm.knowledge.prompt, load_tokenizer(stages.llm_model(llm))
    )
    longest, lora = max(map(len, prompts)) + llm.knowledge.max_new_tokens, job.align.trainer.lora
    engine = Engine(stages.llm_model(llm), llm.engine, longest, lora_rank=lora.rank if lora else 0)
    engine.load_weights(aligned, "aligned")
    reading = SequenceRecommender.from_pretrained(stages.final / MODEL).items
    encode = vectors_by(reading, TextEncoder(stages.encoder_model(llm), llm.encoder))

    def answer(request: int) -> Any:
        prompt = prompts[request % len(prompts)]
        [completion] = engine.generate([prompt], [request], llm.knowledge.max_new_tokens)
        return encode([completion.text])

    return answer


def _timed(answer: Callable[[int], Any], requests: int) -> dict[str, float]:
    """Median and 95th percentile of seconds a request, after a warm-up."""
    seconds = []
    for request in range(-WARM_UP, requests):
        begin = time.perf_counter()
        answer(request)
        if request >= 0:
            seconds.append(time.perf_counter() - begin)
    seconds.sort()
    return {"median_s": statistics.median(seconds), "p95_s": seconds[int(0.95 * (len(seconds) - 1))]}
