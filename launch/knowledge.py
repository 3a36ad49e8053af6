"""``recalign knowledge``: texts and vectors for a whole catalog, from an original or an aligned LLM."""

import contextlib
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyarrow import parquet
from torch import Tensor

from align.config import MainJob, Stages, load_job
from align.snapshots import SnapshotStore
from launch import supervise
from llm.config import LLMConfig
from llm.fingerprint import fingerprint
from llm.knowledge import KnowledgeFile
from llm.text_encoder import TextEncoder
from llm.text_items import vectors_by
from rec.build import MODEL
from rec.data.builtin import BUILTIN, prepare_builtin
from rec.data.prepared import Prepared
from rec.models.base import Recommender
from rec.runtime import config, files
from rec.runtime.arrow_files import write_table
from rec.runtime.config import hash_of
from rec.runtime.errors import UserError
from rec.runtime.parent import die_with_parent
from rec.runtime.runfolder import CONFIG

log = logging.getLogger(__name__)

VECTOR, ENCODER = "vector", b"encoder"
STALLED_S = 2 * 3600.0  # longest that vLLM may take for one call, its start included


def run(
    source: Path, out: Path, data: Path | None = None, original: bool = False, shard: tuple[int, int] = (0, 1)
) -> None:
    """Generate the texts that ``out`` does not hold yet, and encode those that have no vector yet.

    Args:
        source: a recipe, whose LLM is the original one, or the run folder of a main job, whose LLM is the aligned one.
        out: the parquet file to make or to complete.
        data: a prepared folder whose items are asked about; by default the job's own.
        original: take a run's original LLM.
        shard: (i, n): generate the i-th of n parts of the texts alone, beside processes that generate the others; the
            one that is done last writes the file.

    Raises:
        UserError: if there is no such LLM yet.
    """
    job = load_job(source / CONFIG if source.is_dir() else source)
    stages = Stages(job.run)
    files.require_writable(out)
    folder = data or stages.data_folder(job.data)
    if data is None and job.data in BUILTIN:
        prepare_builtin(job.data, folder)
    Prepared.load(folder)  # says what is wrong before anything heavy starts
    original = original or not source.is_dir()
    model, version = _model(job, stages, original)
    encoder, trained = stages.encoder_model(job.llm), _trained_with(job, stages, original)
    mark = hash_of([fingerprint(trained or encoder), job.llm.encoder.max_tokens])
    kept = _vectors(out, mark)
    log_path = out.with_suffix(f".{shard[0]}.log" if shard[1] > 1 else ".log")
    generate(job.llm, model, version, folder, out, log_path, shard)
    if not is_whole(out):
        return
    frozen = TextEncoder(encoder, job.llm.encoder)
    encode(out, vectors_by(Recommender.from_pretrained(trained).items, frozen) if trained else frozen, mark, kept)


def is_whole(out: Path) -> bool:
    """Whether no shard of the file is still to come."""
    return out.exists() and not KnowledgeFile(out).parts.exists()


def generate(
    llm: LLMConfig, model: str, version: str, data: Path, out: Path, log_path: Path, shard: tuple[int, int] = (0, 1)
) -> None:
    """Generate texts in a process of its own, which returns the engine's memory when it ends.

    Raises:
        UserError: with the process's own message, if it called its end a user's mistake.
        RuntimeError: if it died, or wrote nothing for ``STALLED_S``; with the end of its log.
    """
    settings = out.absolute().with_name(f"{out.stem}.llm.yaml")
    files.write_text(settings, config.to_yaml(llm))
    command = [
        sys.executable, "-m", "llm.knowledge", "--config", str(settings), "--model", model,
        "--data", str(data), "--version", version, "--out", str(out), "--shard", f"{shard[0]}/{shard[1]}",
    ]  # fmt: skip
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("ab") as stream:
        begin = stream.tell()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
    try:
        code = _wait(process, KnowledgeFile(out).parts)
    finally:
        process.kill()
        process.wait()
    if code is None:
        raise RuntimeError(f"waited {STALLED_S:.0f} s for vLLM to write more texts for {out}; see {log_path}")
    if code:
        cause = supervise.last_words(log_path, begin)
        raise RuntimeError(f"generation ended with exit code {code}: {cause}; see {log_path}")


def _wait(process: subprocess.Popen, parts: Path) -> int | None:
    """The exit code of a process that writes ``parts``; None if it has written none for ``STALLED_S``."""
    written, since = -1, time.monotonic()
    while process.poll() is None:
        if (now := len(list(parts.glob("part-*")))) != written:
            written, since = now, time.monotonic()
        elif time.monotonic() - since > STALLED_S:
            return None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(supervise.POLL_S)
    return process.returncode


def encode(out: Path, encoder: Callable[[list[str]], Tensor], mark: str, kept: dict[str, np.ndarray]) -> None:
    """Write the vectors [N, K] of a knowledge file's texts beside them.

    Args:
        out: the file.
        encoder: of the texts [n] to vectors [n, K], for those whose vectors are not ``kept``.
        mark: names the encoder, in the file.
        kept: vectors [K] that the same encoder made before, by the key of their text.
    """
    # Two shards that end together both find the file whole: the second one here takes the first one's vectors.
    with KnowledgeFile(out).sole_writer():
        kept = {**kept, **_vectors(out, mark)}
        table = parquet.read_table(out)
        if VECTOR in table.column_names:
            table = table.drop_columns(VECTOR)
        keys = table["key"].to_pylist()
        texts = dict(zip(keys, table["text"].to_pylist(), strict=True))
        new = [key for key in texts if key not in kept]
        if new:
            made = encoder([texts[key] for key in new]).numpy().astype(np.float32)
            kept |= dict(zip(new, made, strict=True))
        log.info("%s: %d texts encoded, %d kept", out, len(new), len(texts) - len(new))
        flat = np.concatenate([kept[key] for key in keys])
        column = pa.FixedSizeListArray.from_arrays(pa.array(flat), len(flat) // len(keys))
        table = table.append_column(VECTOR, column)
        write_table(out, table.replace_schema_metadata({**(table.schema.metadata or {}), ENCODER: mark}))


def _vectors(out: Path, mark: str) -> dict[str, np.ndarray]:
    """The vectors that a file holds, by the key of their text; none if another encoder made them."""
    if not out.exists():
        return {}
    try:
        schema = parquet.read_schema(out)
        if (schema.metadata or {}).get(ENCODER) != mark.encode():
            return {}
        table = parquet.read_table(out, columns=["key", VECTOR])
    except (OSError, pa.ArrowException):
        return {}  # whoever reads the texts says what is wrong
    column = table[VECTOR].combine_chunks()
    vectors = column.values.to_numpy().reshape(len(table), -1)
    return dict(zip(table["key"].to_pylist(), vectors, strict=True))


def _trained_with(job: MainJob, stages: Stages, original: bool) -> Path | None:
    """The recommender whose encoder the texts are for, where encoders are trained with recommenders."""
    if not job.llm.encoder.trained:
        return None
    folder = (stages.na if original else stages.final) / MODEL
    if not folder.is_dir():
        raise UserError(f"llm.encoder.trained: {folder} is not trained yet, and the encoder with it")
    return folder


def _model(job: MainJob, stages: Stages, original: bool) -> tuple[str, str]:
    """Where the LLM is, and the name of its version."""
    if original:
        model = stages.llm_model(job.llm)
        if job.llm.model is None and not Path(model).is_dir():
            raise UserError(f"{job.run} has no LLM yet: llm.model names none, and none is trained there")
        return model, "original"
    newest = SnapshotStore(stages.snapshots).newest(whole=True)
    if newest is None:
        raise UserError(f"{job.run} has no aligned LLM yet; --original takes the one that it started from")
    if newest.step < job.align.trainer.steps:
        log.warning(
            "the alignment of %s is not finished: these are texts of step %d of %d",
            job.run, newest.step, job.align.trainer.steps,
        )  # fmt: skip
    return str(newest.llm), f"v{newest.version}"
