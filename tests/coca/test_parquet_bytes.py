"""Parquet files that lie in memory."""

import io
import random
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


def test_a_field_that_should_hold_no_null_may_lack() -> None:
    schema = pa.schema([pa.field("name", pa.string(), nullable=False), pa.field("new", pa.int8(), nullable=False)])
    found = parse_parquet(encode(pa.table({"name": pa.array([None, "b"], pa.string())})), schema)
    assert found.schema == schema
    assert found.to_pylist() == [{"name": None, "new": None}, {"name": "b", "new": None}]


WHOLE = encode(SCHEMA.empty_table())
DAMAGED = {
    "empty": b"",
    "only the magic": b"PAR1",
    "cut off": WHOLE[:-1],
    "the footer overwritten": WHOLE[:8] + bytes(len(WHOLE) - 16) + WHOLE[-8:],
    "another type": encode(pa.table({"rows": ["many"]})),
    "a list where a number goes": encode(pa.table({"rows": [[1, 2]]})),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
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


def test_flipped_bytes_give_a_table_or_are_refused() -> None:
    chance = random.Random(0)
    whole = encode(pa.table({"name": ["a", "b"], "rows": [1, 2], "later": [[1], None]}, schema=SCHEMA))
    refused = 0
    for _ in range(1000):
        data = bytearray(whole)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        try:
            assert parse_parquet(bytes(data), SCHEMA).schema == SCHEMA
        except pa.ArrowInvalid:
            refused += 1
    assert refused > 100
