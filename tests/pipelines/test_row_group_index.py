"""The index of a version's row groups: sorted, and never over another one."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from coca.contract import ROW_GROUPS
from coca.storage import Store
from pipelines.row_group_index import write_row_groups


def groups(*places: tuple[str, int]) -> pa.Table:
    rows = [
        {"samples_path": path, "annotations_path": path, "row_group": number, "rows": 4, "selected": 3}
        for path, number in places
    ]
    return pa.Table.from_pylist(rows, schema=ROW_GROUPS)


def test_the_order_is_that_of_the_files(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path, digest = write_row_groups(store, 7, groups(("b", 1), ("a", 0), ("b", 0)))
    index = pq.read_table(tmp_path / path, schema=ROW_GROUPS).to_pylist()
    assert [(row["samples_path"], row["row_group"]) for row in index] == [("a", 0), ("b", 0), ("b", 1)]
    assert write_row_groups(store, 7, groups(("b", 0), ("b", 1), ("a", 0))) == (path, digest)


def test_another_index_never_takes_the_place_of_one_that_a_record_may_name(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path, _ = write_row_groups(store, 7, groups(("a", 0)))
    before = store.read(path)
    other, _ = write_row_groups(store, 7, groups())
    assert other != path
    assert store.read(path) == before
    assert write_row_groups(store, 7, groups()) == (other, write_row_groups(store, 7, groups())[1])
