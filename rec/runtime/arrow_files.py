"""Arrow tables as files that are either whole or absent."""

from pathlib import Path

import pyarrow as pa
from pyarrow import parquet

from rec.runtime import files


def table_bytes(table: pa.Table) -> bytes:
    """A table as the bytes of a parquet file."""
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def write_table(path: Path, table: pa.Table) -> None:
    """Replace a parquet file atomically."""
    files.write_bytes(path, table_bytes(table))
