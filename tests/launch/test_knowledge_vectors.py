"""Vectors beside a catalog's texts: made once each, whoever gets there first; and nobody waits for ever."""

import logging
import subprocess
import sys
from dataclasses import replace

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from align.config import MainJob, Stages
from align.snapshots import SnapshotStore
from launch import knowledge
from launch.alignment.main_job import MainJobRun
from launch.knowledge import ENCODER, VECTOR, encode
from llm import knowledge as files
from llm.knowledge import KnowledgeFile, Said, count_texts
from rec.runtime.config import build


def test_shards_that_end_together_encode_every_text_once(tmp_path):
    out, asked = tmp_path / "knowledge.parquet", []

    def encoder(texts):
        asked.extend(texts)
        return torch.tensor([[float(len(text)), 1.0] for text in texts])

    texts = pa.table({"key": ["a", "b", "a"], "text": ["x", "yyy", "x"]})
    parquet.write_table(texts, out)
    for _ in range(2):
        encode(out, encoder, "mark", {})
        table = parquet.read_table(out)
        assert table.column_names == ["key", "text", VECTOR]
        assert table[VECTOR].to_pylist() == [[1.0, 1.0], [3.0, 1.0], [1.0, 1.0]]
    assert asked == ["x", "yyy"]

    encode(out, encoder, "another encoder", {"a": torch.tensor([7.0, 7.0]).numpy()})
    table = parquet.read_table(out)
    assert table[VECTOR].to_pylist() == [[7.0, 7.0], [3.0, 1.0], [7.0, 7.0]]
    assert asked[2:] == ["yyy"]
    assert table.schema.metadata[ENCODER] == b"another encoder"


def test_waiting_for_another_writer_ends_and_names_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WRITER_TIMEOUT_S", 0.1)
    file = KnowledgeFile(tmp_path / "knowledge.parquet")
    with file.sole_writer(), pytest.raises(TimeoutError, match="another process to finish"), file.sole_writer():
        pass
    with file.sole_writer():
        pass


def test_a_generation_that_writes_nothing_more_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(knowledge, "STALLED_S", 0.5)
    hangs = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    try:
        assert knowledge._wait(hangs, tmp_path) is None
    finally:
        hangs.kill()
        hangs.wait()
    ends = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    assert knowledge._wait(ends, tmp_path) == 3


def test_texts_that_are_empty_or_cut_are_counted_and_older_files_do_not_tell(tmp_path):
    file = KnowledgeFile(tmp_path / "knowledge.parquet")
    file.keep(["a", "b"], [Said("", False), Said("so long", True)])
    assert file.texts() == {"a": Said("", False), "b": Said("so long", True)}
    parquet.write_table(pa.table({"key": ["a", "b"], "text": ["", "so long"], "cut": [False, True]}), file.path)
    assert count_texts(file.path) == {"rows": 2, "empty": 1, "cut": 1}
    parquet.write_table(pa.table({"key": ["a", "c"], "text": ["", "short"]}), file.path)
    assert count_texts(file.path) == {"rows": 2, "empty": 1, "cut": 0}
    assert file.texts()["c"] == Said("short", None)


def test_texts_of_an_alignment_that_is_not_finished_say_so(tmp_path, caplog):
    job = build(MainJob, {"data": "x", "run": str(tmp_path / "run"), "align": {"trainer": {"steps": 100}}})
    stages = Stages(job.run)
    store = SnapshotStore(stages.snapshots)
    for version, step, told in ((0, 50, ["are texts of step 50 of 100"]), (1, 100, [])):
        store.publish(version, step, lambda folder: (folder / "llm").mkdir(), [], [])
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert knowledge._model(job, stages, original=False)[1] == f"v{version}"
        assert [part for part in told if part not in caplog.text] == []
        assert len(caplog.records) == len(told)


def test_items_without_any_text_are_counted(small_data, tmp_path):
    run = MainJobRun(build(MainJob, {"data": "x", "run": str(tmp_path), "llm": {"item_text": "{title}"}}))
    titles = ["", "  ", *small_data.items["title"].to_pylist()[2:]]
    table = pa.table({"item_id": small_data.items["item_id"], "title": titles})
    run.data = replace(small_data, items=table)
    for path in (run.stages.na_knowledge, run.stages.final_knowledge):
        path.parent.mkdir(exist_ok=True)
        parquet.write_table(pa.table({"text": ["", "b"], "cut": [False, True]}), path)
    counts = {"rows": 2, "empty": 1, "cut": 1}
    assert run._text_counts() == {"items_without_text": 2, "not_aligned": counts, "aligned": counts}
