"""Arrow tables as files that are either whole or absent."""

from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from rec.runtime import files


def write_table(path: Path, table: pa.Table) -> None:
    """Replace a parquet file atomically."""
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    files.write_bytes(path, sink.getvalue().to_pybytes())
