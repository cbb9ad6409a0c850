"""Parquet that lies in memory: small files that were read whole, and what a damage of them is called."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq


def parse_parquet(data: bytes, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema``; one that the file lacks is null.

    Parsed in the calling thread. Threads of Arrow's own, as `pyarrow.parquet.read_table` has them, may hold ``data``
    for a moment after it has returned, and Python, where it ends in that moment, aborts (apache/arrow, issue 33975).

    Raises:
        pa.ArrowInvalid: it is no whole Parquet file, or its columns are not of the schema's types.
    """
    with damage_is_told():
        file = pq.ParquetFile(pa.BufferReader(data))
        there = [name for name in schema.names if name in file.schema_arrow.names]
        stored = file.read(columns=there, use_threads=False)
        columns = [
            stored[field.name].cast(field.type) if field.name in there else pa.nulls(stored.num_rows, field.type)
            for field in schema
        ]
    return pa.table(columns, schema=schema)


@contextmanager
def damage_is_told() -> Iterator[None]:
    """Around what is parsed from memory: there an OSError of Arrow's is damage, and no storage to be asked again.

    Raises:
        pa.ArrowInvalid: for whatever Arrow raises of damaged bytes.
    """
    try:
        yield
    except (OSError, UnicodeError, pa.ArrowNotImplementedError) as error:
        raise pa.ArrowInvalid(str(error)) from None
