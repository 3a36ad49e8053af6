"""Vectors beside a catalog's texts: made once each, whoever gets there first."""

import pyarrow as pa
import torch
from pyarrow import parquet

from launch.knowledge import ENCODER, VECTOR, encode


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
