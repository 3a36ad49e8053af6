"""``recalign bench lmrec``: speed and memory of LMRec's training step, beside transformers' own trainer.

Every measurement is one process of its own and one line of ``measured.jsonl``; an interrupted run goes on with the next
one. Model, data, precision and batch are the same for both trainers of a comparison, and both run in the same command.
"""

import itertools
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from launch.bench.child import last_line
from launch.bench.machine import machine
from llm.corpus import IGNORED, LanguageBatch, PackedBatches
from llm.joint import JointModel
from llm.lmrec_job import LMRecJob, load_job
from llm.lmrec_run import build_model, read_inputs
from llm.mixture import histories
from llm.speed import flops_per_token, peak_flops
from llm.update import Part, PlainEngine
from rec.precision import dtype_of, is_bf16
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.logs import run_main
from rec.runtime.ranks import Ranks
from rec.runtime.runfolder import RunFolder

log = logging.getLogger(__name__)

FASTER, MEMORY_GIB, GPU_MFU = 1.3, 3.0, 0.5
BY_LENGTH = "padded-by-length"
# transformers' as its users start it, and with the settings of malloc that every process of ours has on a CPU.
TRAINER, TRAINER_OUR_MALLOC = "trainer", "trainer-our-malloc"
NAMES = ("packed", "padded", BY_LENGTH, TRAINER, TRAINER_OUR_MALLOC, "matmul", "memory", "gpu")


def run(
    recipe: Path, overrides: Sequence[str], out: Path, steps: int, names: Sequence[str], command: str
) -> dict[str, Any]:
    """Measure what is not measured yet, and write ``result.json``.

    Args:
        recipe: of a pretraining; its model, data and precision are measured.
        overrides: of its keys.
        out: the folder of the measurements.
        steps: timed, of each trainer, after a first one.
        names: which of ``NAMES``.
        command: what the user typed; goes into the result.

    Raises:
        UserError: if a name is unknown.
    """
    if unknown := [name for name in names if name not in NAMES]:
        raise UserError(f"unknown measurement {unknown[0]!r}; there are: {', '.join(NAMES)}")
    job = load_job(recipe, [*overrides, f"run={json.dumps(str(out))}", "llm.train.zero_stage=0"])
    begin, folder = time.monotonic(), RunFolder(out)
    with folder.lock("bench"):
        folder.claim(job)
        rows = []
        for name in names:
            where = {"name": name, "steps": steps, "machine": machine()}
            known = [row for row in folder.events("measured") if where.items() <= row.items()]
            if not known:
                log.info("%s", name)
                folder.log("measured", **where, **_in_a_process(out / "config.yaml", name, steps))
                known = folder.events("measured")
            rows.append({key: value for key, value in known[-1].items() if key not in ("event", "time_s", "pid")})
        return folder.write_result(
            command, hash_of(job.model_dump(mode="json", exclude={"run"})), {}, rows, time.monotonic() - begin,
            claims(rows),
        )  # fmt: skip


def claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The aims that these rows can tell about."""
    own = {row["name"]: row for row in rows if "not_measured" not in row}
    found = []
    for name, told in ((TRAINER, "as its users start it"), (TRAINER_OUR_MALLOC, "with our settings of malloc")):
        if "packed" in own and name in own:
            ratio = own["packed"]["tokens_per_s"] / own[name]["tokens_per_s"]
            told = f"tokens/s are at least {FASTER} times those of transformers' Trainer {told}"
            found.append((told, ratio >= FASTER, ratio))
    for name, told in (("padded", "padded ones"), (BY_LENGTH, "padded ones of like length")):
        if "packed" in own and name in own:
            ratio = own["packed"]["tokens_per_s"] / own[name]["tokens_per_s"]
            found.append((f"packed rows train more useful tokens a second than {told}", ratio > 1, ratio))
    if "memory" in own:
        gib = own["memory"]["peak_gib"]
        found.append((f"peak memory of a 125M step at context 2,048 is below {MEMORY_GIB} GiB", gib < MEMORY_GIB, gib))
    if "gpu" in own:
        mfu = own["gpu"]["mfu_of_measured_matmul"]
        found.append((f"125M on a GPU reaches {GPU_MFU:.0%} of its measured matmul rate", mfu >= GPU_MFU, mfu))
    return [{"id": name, "holds": bool(holds), "figure": round(figure, 4)} for name, holds, figure in found]


def measure(job: LMRecJob, name: str, steps: int) -> dict[str, Any]:
    """One measurement, in this process."""
    if name == "memory":
        return memory_of_125m()
    if name == "gpu":
        return gpu_125m(steps)
    if name == "matmul":
        dtype = dtype_of(job.llm.train.precision)
        return {"flops": matmul_rate(dtype), "dtype": str(dtype).removeprefix("torch.")}
    ways = {"packed": _packed, "padded": _padded, BY_LENGTH: partial(_padded, by_length=True)}
    ways |= {TRAINER: _trainer, TRAINER_OUR_MALLOC: _trainer}
    rate = ways[name](job, steps)
    if name != "packed":
        return {"tokens_per_s": round(rate, 1)}
    model = _model(job, eos=0)
    parameters = sum(parameter.numel() for parameter in model.decoder.parameters())
    flops = rate * flops_per_token(model.decoder.config, parameters, job.llm.lmrec.context)
    share = flops / matmul_rate(dtype_of(job.llm.train.precision))
    return {"tokens_per_s": round(rate, 1), "parameters": parameters, "share_of_matmul_rate": round(share, 4)}


def packed_and_padded(job: LMRecJob, steps: int) -> dict[str, float]:
    """Useful tokens a second of both, each in a process of its own."""
    found = {}
    for name in ("packed", "padded"):
        path = Path(job.run) / "config.yaml"
        found[name] = _in_a_process(path, name, steps)["tokens_per_s"]
    return found


def matmul_rate(dtype: torch.dtype, size: int = 2048, seconds: float = 2.0) -> float:
    """FLOP/s of a square matrix product on this machine."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = 8192 if device.type == "cuda" else size
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = 0.0, time.monotonic() + seconds
    while time.monotonic() < end:
        _wait(device)
        begin = time.perf_counter()
        for _ in range(5):
            left @ right
        _wait(device)
        best = max(best, 5 * 2 * size**3 / (time.perf_counter() - begin))
    return best


def memory_of_125m() -> dict[str, Any]:
    """Peak resident memory of one step of the 125M preset, context 2,048, one row, bf16, on the CPU."""
    import resource

    at_rest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    engine, batch = _preset_125m({"activation_checkpointing": True})
    engine.step([Part(batch)], 1e-4)
    engine.step([Part(batch)], 1e-4)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"peak_gib": round(peak, 3), "before_the_model_gib": round(at_rest, 3)}


def gpu_125m(steps: int) -> dict[str, Any]:
    """The 125M preset at context 2,048 on an NVIDIA GPU, against that GPU's own matmul rate."""
    if not torch.cuda.is_available():
        return {"not_measured": "no NVIDIA GPU here"}
    engine, batch = _preset_125m({"compile": True}, rows=32)
    rate = _timed(engine, [batch], steps)
    parameters = sum(parameter.numel() for parameter in engine.model.decoder.parameters())
    flops = rate * flops_per_token(engine.model.decoder.config, parameters, 2048)
    own, stated = matmul_rate(torch.bfloat16), peak_flops(engine.device)
    return {
        "tokens_per_s": round(rate, 1),
        "mfu_of_measured_matmul": round(flops / own, 4),
        "mfu": round(flops / stated, 4),
    }


def _preset_125m(train: dict[str, Any], rows: int = 1) -> tuple[PlainEngine, LanguageBatch]:
    """The preset with random text, a document a row."""
    from llm.packing import Document, pack
    from rec.runtime.config import build

    llm = {"lmrec": {"preset": "125M"}, "recommend": None, "train": {"zero_stage": 0, **train}}
    job = build(LMRecJob, {"data": "none", "run": "none", "llm": llm})
    documents = [Document(own) for own in torch.randint(50_258, (rows, 2048)).tolist()]
    packed = pack(documents, [[row] for row in range(rows)], 0, 2048)
    labels = packed.ids.masked_fill(packed.positions == 0, IGNORED)
    model = _model(job, eos=0)
    return _engine(job, model), LanguageBatch(packed.ids, labels, packed)


@dataclass(frozen=True)
class _Vocabulary:
    """As much of a tokenizer as a model is built from: the recipe's vocabulary, whatever a small catalog yields."""

    size: int
    eos_token_id: int

    def __len__(self) -> int:
        return self.size


def _inputs(job: LMRecJob) -> tuple[list[list[int]], PreTrainedTokenizerBase]:
    """The documents of the recipe's own histories, and their tokenizer."""
    inputs = read_inputs(job, RunFolder(job.run), Ranks())
    task = next(iter(inputs.tasks.values()))
    return histories(task, inputs.tokenizer, job.llm.lmrec.context, job.llm.train.seed), inputs.tokenizer


def _model(job: LMRecJob, eos: int) -> JointModel:
    return build_model(job, _Vocabulary(job.llm.lmrec.vocabulary, eos))


def _engine(job: LMRecJob, model: JointModel) -> PlainEngine:
    train = job.llm.train
    return PlainEngine(model, train.lr, train.weight_decay, train.betas, train.eps, train.clip_norm)


def _packed(job: LMRecJob, steps: int) -> float:
    documents, tokenizer = _inputs(job)
    train = job.llm.train
    batches = PackedBatches(
        documents, job.llm.lmrec.context, tokenizer.eos_token_id, train.micro_rows, train.micro_rows, train.seed
    )
    return _timed(
        _engine(job, _model(job, tokenizer.eos_token_id)), [batches.parts(step)[0] for step in range(steps + 1)]
    )


def _padded(job: LMRecJob, steps: int, by_length: bool = False) -> float:
    """A document a row, padded to the longest of its batch: as many places a step as packed rows."""
    documents, tokenizer = _inputs(job)
    model = _model(job, tokenizer.eos_token_id)
    if not torch.cuda.is_available():
        model.decoder.set_attn_implementation("eager")  # as packed rows have, faster here
    places = job.llm.train.micro_rows * job.llm.lmrec.context
    batches = padded_batches(documents, places, tokenizer.eos_token_id, job.llm.train.seed, by_length)
    return _timed(_engine(job, model), list(itertools.islice(itertools.cycle(batches), steps + 1)))


def padded_batches(
    documents: list[list[int]], places: int, padding: int, seed: int, by_length: bool
) -> list[LanguageBatch]:
    """All documents once, in batches of at most ``places`` with their padding (one document at least).

    In random order, or ``by_length``: those of like length together, and the batches in random order.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(documents)).tolist()
    if by_length:
        order.sort(key=lambda number: len(documents[number]))
    groups: list[list[list[int]]] = [[]]
    for number in order:
        grown = [*groups[-1], documents[number]]
        if len(grown) * max(map(len, grown)) > places and groups[-1]:
            groups.append([documents[number]])
        else:
            groups[-1] = grown
    batches = []
    if by_length:
        groups = [groups[number] for number in rng.permutation(len(groups))]
    for own in groups:
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in own], True, padding)
        inside = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in own])[:, None]
        batches.append(LanguageBatch(ids, ids.masked_fill(~inside, IGNORED)))
    return batches


def _timed(engine: PlainEngine, batches: list[LanguageBatch], steps: int | None = None) -> float:
    """Learnt tokens a second of a step for every batch but the first, or of ``steps`` on the only one."""
    batches = batches * (steps + 1) if steps else batches
    engine.step([Part(batches[0])], 1e-4)
    _wait(engine.device)
    begin = time.perf_counter()
    for batch in batches[1:]:
        engine.step([Part(batch)], 1e-4)
    _wait(engine.device)
    return sum(batch.tokens for batch in batches[1:]) / (time.perf_counter() - begin)


def _trainer(job: LMRecJob, steps: int) -> float:
    """transformers' ``Trainer`` on the same packed rows: the same model, precision, optimizer and clipping."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    documents, tokenizer = _inputs(job)
    train, context = job.llm.train, job.llm.lmrec.context
    batches = PackedBatches(documents, context, tokenizer.eos_token_id, train.micro_rows, train.micro_rows, train.seed)
    # In the dtype of the scores, as packed rows have theirs: a float32 mask would make bfloat16 scores float32.
    dtype = dtype_of(train.precision)
    rows = [row for step in range(steps + 1) for row in _for_trainer(batches.parts(step)[0], dtype)]
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir=str(Path(job.run) / "trainer"), per_device_train_batch_size=train.micro_rows, max_steps=steps + 1,
        learning_rate=1e-4, weight_decay=train.weight_decay, max_grad_norm=train.clip_norm,
        bf16=is_bf16(train.precision), logging_strategy="no", save_strategy="no", report_to=[], disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(), dataloader_num_workers=0,
    )  # fmt: skip
    decoder = _model(job, tokenizer.eos_token_id).decoder
    if not torch.cuda.is_available():
        decoder.set_attn_implementation("eager")  # its faster one here
    trainer = Trainer(decoder, arguments, train_dataset=rows, callbacks=[Clock()])
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(rows)
    trainer.train()
    learnt = sum(batches.parts(step)[0].tokens for step in range(1, steps + 1))
    return learnt / (times[-1] - times[0])


def _for_trainer(batch: LanguageBatch, dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    mask = torch.zeros(batch.packed.mask().shape, dtype=dtype).masked_fill_(
        ~batch.packed.mask(), torch.finfo(dtype).min
    )
    return [
        {"input_ids": batch.ids[row], "labels": batch.labels[row], "position_ids": batch.packed.positions[row],
         "attention_mask": mask[row]}
        for row in range(len(batch.ids))
    ]  # fmt: skip


def _in_a_process(config: Path, name: str, steps: int) -> dict[str, Any]:
    return json.loads(last_line(["-m", "launch.bench.lmrec", str(config), name, str(steps)]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Entry of one measurement."""
    config, name, steps = sys.argv[1:]
    sys.stdout.write(json.dumps(measure(load_job(Path(config)), name, int(steps))) + "\n")


if __name__ == "__main__":
    main() if sys.argv[2] == TRAINER else run_main(main)
