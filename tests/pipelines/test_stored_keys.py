"""Stored rows as sources of selection."""

import pickle
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.dataset import Dataset
from coca.tokenizer import Tokenizer
from coca.withdrawn import WITHDRAWN, append_withdrawn, list_withdrawn
from pipelines.stored_keys import StoredKeys, StoredPart, stored_parts
from tests.stored_dataset import publish, row

ROWS = [row(f"n{n}", f"caption {n}", language="de" if n == 1 else "en", scores=[("a", n / 2)]) for n in range(5)]


@pytest.fixture
def dataset(tmp_path: Path, tokenizer: Tokenizer) -> Dataset:
    lost = row("n9", "lost", selected=False, reason="score")
    return publish(tmp_path / "data", tokenizer, ROWS, [lost], config={})


def keys(dataset: Dataset, part: StoredPart, *columns: str, standing: bool = False) -> StoredKeys:
    return StoredKeys(dataset.store, part, columns, list_withdrawn(dataset.store), standing)


def test_parts_are_those_of_the_index(dataset: Dataset) -> None:
    names = ["first-p00000.parquet", "first-p00001.parquet"]
    assert stored_parts(dataset) == [StoredPart(names[0], names[0], 5), StoredPart(names[1], names[1], 1)]


def test_columns_of_both_tables_row_by_row(dataset: Dataset) -> None:
    first, second = stored_parts(dataset)
    source = pickle.loads(pickle.dumps(keys(dataset, first, "sample_id", "caption", "language", "scores")))
    found = {each["sample_id"]: each for each in source.read().to_pylist()}
    assert source.rows == len(found) == 5
    for each in ROWS:
        note = each["note"]
        expected = {"caption": each["caption"], "language": note["language"], "scores": note["scores"]}
        assert found[each["sample_id"]] == {"sample_id": each["sample_id"], **expected}
    standing = [
        keys(dataset, part, "sample_id", standing=True).read()["standing"].to_pylist() for part in (first, second)
    ]
    assert standing == [[True] * 5, [False]]


def test_withdrawn_rows_are_left_out(dataset: Dataset) -> None:
    first = stored_parts(dataset)[0]
    before = keys(dataset, first, "sample_id")
    entry = {
        "sample_id": ROWS[2]["sample_id"],
        "samples_path": first.samples_path,
        "row_group": 0,
        "reason": "opted_out",
    }
    rows = pa.Table.from_pylist([{**entry, "withdrawn_at": datetime.now(UTC)}], schema=WITHDRAWN)
    append_withdrawn(dataset.store, rows, "takedown")
    after = keys(dataset, first, "sample_id").read()["sample_id"].to_pylist()
    assert sorted(after) == sorted(each["sample_id"] for each in ROWS if each is not ROWS[2])
    assert before.read().num_rows == 5  # the list that this source was made with


def test_files_of_an_older_contract_have_no_scores(dataset: Dataset) -> None:
    first = stored_parts(dataset)[0]
    path = Path(dataset.store.path(f"annotations/{first.annotations_path}"))
    pq.write_table(pq.read_table(path).drop_columns("scores"), path)
    assert keys(dataset, first, "sample_id", "scores").read()["scores"].null_count == 5
