"""Parquet files that lie in memory."""

import io
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.parquet_bytes import parse_parquet

SCHEMA = pa.schema([("name", pa.string()), ("rows", pa.int64()), ("later", pa.list_(pa.int32()))])


def encode(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def test_gives_the_columns_of_the_schema_in_its_order() -> None:
    stored = pa.table({"rows": pa.array([1, 2], pa.int32()), "more": ["x", "y"], "name": ["a", "b"]})
    expected = pa.table({"name": ["a", "b"], "rows": [1, 2], "later": [None, None]}, schema=SCHEMA)
    assert parse_parquet(encode(stored), SCHEMA).equals(expected)


def test_a_table_without_rows_keeps_the_schema() -> None:
    assert parse_parquet(encode(SCHEMA.empty_table()), SCHEMA).equals(SCHEMA.empty_table())


@pytest.mark.parametrize(
    "data",
    [b"", b"PAR1", encode(SCHEMA.empty_table())[:-1], encode(pa.table({"rows": ["many"]}))],
    ids=["empty", "only the magic", "cut off", "of another type"],
)
def test_what_is_no_such_table_is_refused(data: bytes) -> None:
    with pytest.raises(pa.ArrowInvalid):
        parse_parquet(data, SCHEMA)


def test_starts_no_thread_that_could_outlive_python() -> None:
    """Such a thread made `coca train` end with SIGABRT where it had a wrong use to report."""
    program = (
        "import os, sys, pyarrow as pa\n"
        "from coca.parquet_bytes import parse_parquet\n"
        "data, schema = sys.stdin.buffer.read(), pa.schema([('name', pa.string())])\n"
        "before = set(os.listdir('/proc/self/task'))\n"
        "assert parse_parquet(data, schema).num_rows == 2\n"
        "print(len(set(os.listdir('/proc/self/task')) - before))\n"
    )
    data = encode(pa.table({"name": ["a", "b"]}))
    done = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, check=True)
    assert int(done.stdout) == 0
