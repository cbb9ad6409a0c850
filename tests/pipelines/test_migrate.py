"""Contract migrations: a dataset of contract 1 is read, widened and added to."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from deltalake import DeltaTable

from coca.contract import ANNOTATIONS, LINKS, SAMPLES, version_path
from coca.dataset import Dataset
from coca.errors import BadInput, RunFailed
from coca.storage import Store
from coca.tokenizer import Tokenizer
from pipelines import tables as tables_module
from pipelines.compact import compact
from pipelines.lease import hold_lease
from pipelines.migrate import migrate_tables, missing_columns
from pipelines.tables import SCHEMAS, create_tables, drop_foreign_files, open_table, read_data_files, table_files
from pipelines.verify import verify
from tests.pipelines import published as published_module
from tests.pipelines.published import Pair, Published, everything, pairs

NEW = {"samples": "extra", "annotations": "scores", "links": "stored"}
CONTRACT_1 = {
    name: pa.schema([field for field in schema if field.name != NEW[name]])
    for name, schema in {"samples": SAMPLES, "annotations": ANNOTATIONS, "links": LINKS}.items()
}


@pytest.fixture
def old(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> Published:
    """Version 1 of a dataset as the release before wrote it: its tables and its files lack the new columns."""
    published = Published(str(tmp_path / "d"), tokenizer)
    with monkeypatch.context() as patch:
        for name, schema in CONTRACT_1.items():
            patch.setitem(tables_module.SCHEMAS, name, schema)
        patch.setattr(published_module, "SAMPLES", CONTRACT_1["samples"])
        patch.setattr(published_module, "ANNOTATIONS", CONTRACT_1["annotations"])
        published.refresh([*pairs(1, 2), Pair(3, rejected="timeout")], [Pair(4, reason="duplicate_image")])
    path = version_path(1)
    record = json.loads(published.store.read(path)) | {"contract_version": 1}
    published.store.write(path, json.dumps(record).encode())
    return published


def columns(store: Store) -> dict[str, set[str]]:
    return {name: {field.name for field in open_table(store, name).schema().fields} for name in SCHEMAS}


def test_contract_1_is_read_as_it_is(old: Published) -> None:
    assert columns(old.store) == {name: set(schema.names) for name, schema in CONTRACT_1.items()}
    rows = everything(Dataset(old.uri))
    assert [row["extra"] for row in rows] == [None] * 3
    assert verify(old.uri, report=print).faults == 0


def test_the_tables_are_widened_once_and_added_to(old: Published) -> None:
    before = everything(Dataset(old.uri))
    assert migrate_tables(old.store) == {name: [column] for name, column in NEW.items()}
    versions = [open_table(old.store, name).version() for name in SCHEMAS]
    assert columns(old.store) == {name: set(schema.names) for name, schema in SCHEMAS.items()}
    assert migrate_tables(old.store) == {}
    assert [open_table(old.store, name).version() for name in SCHEMAS] == versions
    assert everything(Dataset(old.uri)) == before
    dataset = old.refresh(pairs(5))
    assert len(everything(dataset)) == 4
    assert everything(Dataset(old.uri, 1)) == before
    delta_version = dataset.record.links.delta_version
    files = table_files(open_table(old.store, "links", delta_version))
    assert sorted(map(str, read_data_files(old.store, "links", sorted(files), ["stored"])["stored"].to_pylist())) == [
        *["None"] * 4,
        "True",
    ]
    # Another reader of the Delta table sees one table with the columns of both.
    notes = open_table(old.store, "annotations").to_pyarrow_table()
    assert notes.num_rows == 4
    assert "scores" in notes.column_names
    assert verify(old.uri, report=print).faults == 0


def test_a_table_that_was_taken_back_is_widened_again(old: Published) -> None:
    published = {name: open_table(old.store, name).version() for name in SCHEMAS}
    migrate_tables(old.store)
    old.commit([pairs(6)], "killed")
    for name in SCHEMAS:
        drop_foreign_files(old.store, name, published[name], "another")
    assert columns(old.store)["samples"] == set(CONTRACT_1["samples"].names)
    assert migrate_tables(old.store) == {name: [column] for name, column in NEW.items()}


def test_a_compaction_widens_the_ledger(old: Published) -> None:
    old.commit([[Pair(1, rejected="timeout")]], "refresh2")
    index = Dataset(old.uri).recorded_row_groups
    old.publish(index, "refresh2")
    result = compact(old.uri)
    assert result.buckets == 1
    assert Dataset(old.uri).record.contract_version == 2
    assert columns(old.store)["links"] == set(LINKS.names)
    assert verify(old.uri, report=print).faults == 0


def test_a_table_that_coca_did_not_write_is_refused(tmp_path: Path) -> None:
    DeltaTable.create(str(tmp_path / "samples"), pa.schema([pa.field("sample_id", pa.int64(), nullable=False)]))
    with pytest.raises(BadInput, match=r"column sample_id of .* is .*long.*, the contract says .*string"):
        missing_columns(open_table(Store(tmp_path), "samples"), "samples")
    DeltaTable.create(str(tmp_path / "links"), pa.schema([pa.field("sample_id", pa.string(), nullable=False)]))
    with pytest.raises(BadInput, match=r"lacks bucket, url, caption, .*, which no contract was without"):
        missing_columns(open_table(Store(tmp_path), "links"), "links")


def test_who_lost_the_lease_widens_nothing(old: Published) -> None:
    with hold_lease(old.store, "coca data refresh") as lease:
        old.store.write("leases/2.json", old.store.read("leases/1.json"))
        with pytest.raises(RunFailed, match="was taken over by"):
            migrate_tables(old.store, lease)
    assert columns(old.store)["samples"] == set(CONTRACT_1["samples"].names)


def test_a_new_dataset_lacks_nothing(tmp_path: Path) -> None:
    create_tables(Store(tmp_path))
    assert migrate_tables(Store(tmp_path)) == {}
