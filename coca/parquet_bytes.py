"""Small Parquet files that were read whole, such as indexes whose digest is checked first."""

import pyarrow as pa
import pyarrow.parquet as pq


def parse_parquet(data: bytes, schema: pa.Schema) -> pa.Table:
    """The columns of ``schema``; one that the file lacks is null.

    Parsed in the calling thread. Threads of Arrow's own, as `pyarrow.parquet.read_table` has them, may hold ``data``
    for a moment after it has returned, and Python, where it ends in that moment, aborts (apache/arrow, issue 33975).

    Raises:
        pa.ArrowInvalid: it is no whole Parquet file, or its columns are not of the schema's types.
    """
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        there = [name for name in schema.names if name in file.schema_arrow.names]
        stored = file.read(columns=there, use_threads=False)
        columns = [
            stored[field.name].cast(field.type) if field.name in there else pa.nulls(stored.num_rows, field.type)
            for field in schema
        ]
    except (OSError, pa.ArrowNotImplementedError) as error:  # as Arrow calls some damages, and some types
        raise pa.ArrowInvalid(str(error)) from None
    return pa.table(columns, schema=schema)
