"""Annotation files: row groups as those of the samples, one commit for a whole table."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.contract import ANNOTATIONS
from coca.errors import RunFailed
from coca.storage import Store
from pipelines.annotations import (
    changed_rows,
    reasons_of,
    replace_annotations,
    rewrite_name,
    row_groups_of,
    with_scores,
    with_selection,
    write_annotations,
)
from pipelines.lease import hold_lease
from pipelines.tables import create_tables, open_table, table_files


def rows(count: int = 5) -> pa.Table:
    notes = [
        {"sample_id": str(n), "tokens": [1, n, 2], "language": "en", "selected": n != 3, "reason": None, "scores": None}
        for n in range(count)
    ]
    return pa.Table.from_pylist(notes, schema=ANNOTATIONS)


def test_a_file_and_its_row_groups(tmp_path: Path) -> None:
    store = Store(tmp_path)
    written = write_annotations(store, "a.parquet", rows(), 2, samples_path="s.parquet")
    file = pq.ParquetFile(tmp_path / "annotations/a.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(3)] == [2, 2, 1]
    assert file.read().cast(ANNOTATIONS).equals(rows())
    assert written.file.size == (tmp_path / "annotations/a.parquet").stat().st_size
    assert [(g["row_group"], g["rows"], g["selected"]) for g in written.row_groups()] == [
        (0, 2, 2),
        (1, 2, 1),
        (2, 1, 1),
    ]
    assert row_groups_of([written]).to_pylist() == written.row_groups()


def test_verdicts_by_id() -> None:
    unselected = pa.table({"sample_id": ["4", "1"], "reason": ["score", "language"]})
    reason = reasons_of(rows()["sample_id"], unselected)
    after = with_selection(rows(), reason)
    assert after["reason"].to_pylist() == [None, "language", None, None, "score"]
    assert after["selected"].to_pylist() == [True, False, True, True, False]
    assert after.schema.names == ANNOTATIONS.names
    assert changed_rows(rows(), after).tolist() == [False, True, False, False, True]
    assert reasons_of(rows()["sample_id"], unselected.slice(0, 0)).null_count == 5


def test_scores_are_added_and_replaced() -> None:
    def scores(values: list[list[tuple[str, float]] | None]) -> pa.Table:
        kind = ANNOTATIONS.field("scores").type
        return pa.table({"sample_id": ["0", "1", "2"], "scores": pa.array(values, kind)})

    first = with_scores(rows(3), scores([[("a", 0.5)], None, [("a", 1.0), ("b", 2.0)]]))
    assert first["scores"].to_pylist() == [[("a", 0.5)], None, [("a", 1.0), ("b", 2.0)]]
    second = with_scores(first, scores([[("b", 3.0)], [("b", 4.0)], [("b", 5.0)]]))
    assert second["scores"].to_pylist() == [[("a", 0.5), ("b", 3.0)], [("b", 4.0)], [("a", 1.0), ("b", 5.0)]]


def test_the_table_is_replaced_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    create_tables(store)
    with hold_lease(store, "test") as lease:
        first = [write_annotations(store, "a.parquet", rows(), 2, samples_path="s.parquet")]
        replace_annotations(store, first, "one", lease)
        second = [write_annotations(store, "b.parquet", rows(3), 2, samples_path="s.parquet")]
        version = replace_annotations(store, second, "two", lease)
        assert replace_annotations(store, second, "two", lease) == version
        assert table_files(open_table(store, "annotations")) == {"b.parquet": 3}
        assert (version.files, version.rows) == (1, 3)
        gone = [write_annotations(store, "c.parquet", rows(), 2, samples_path="s.parquet")]
        (tmp_path / "annotations/c.parquet").write_bytes(b"cut")
        with pytest.raises(RunFailed, match=r"c\.parquet has 3 bytes, .* were written: something else writes here"):
            replace_annotations(store, gone, "three", lease)


def test_names_follow_from_settings() -> None:
    assert rewrite_name("select", 1, {"a": 1, "b": 2}) == rewrite_name("select", 1, {"b": 2, "a": 1})
    assert rewrite_name("select", 1, {"a": 1}) != rewrite_name("select", 2, {"a": 1})
