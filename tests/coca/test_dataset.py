"""Opening a dataset: whole, or refused with the file and the way out."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.dataset import Dataset
from coca.errors import BadInput
from coca.train_config import FeedConfig, TrainConfig
from coca.withdrawn import WITHDRAWN, append_withdrawn

MakeDataset = Callable[..., Dataset]


def test_rows_come_with_their_tokens(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(unselected=(1,))
    table = dataset.read_row_group(0)
    assert table.column_names == ["sample_id", "image", "caption", "tokens"]
    assert [int(key, 16) for key in table["sample_id"].to_pylist()] == [0, 2, 3]
    everything = dataset.read_row_group(0, only_selected=False)
    assert everything["selected"].to_pylist() == [True, False, True, True]
    assert everything["reason"].to_pylist() == [None, "duplicate_image", None, None]
    assert dataset.tokenizer.decode(table["tokens"][0].as_py()) == table["caption"][0].as_py()


def test_no_dataset_and_no_such_version(tmp_path: Path, make_dataset: MakeDataset) -> None:
    with pytest.raises(BadInput, match=r"holds no published dataset version. Make one with `coca data refresh"):
        Dataset(str(tmp_path / "nothing"))
    with pytest.raises(BadInput, match=r"has no version 7. It has 1"):
        Dataset(make_dataset().store.uri, 7)


def test_damage_is_named(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    root = Path(dataset.store.root)

    def damaged(path: str, data: bytes) -> Dataset:
        (root / path).write_bytes(data)
        return Dataset(str(root))

    index = (root / "versions/1.row_groups.parquet").read_bytes()
    with pytest.raises(BadInput, match=r"row_groups.parquet does not match its digest"):
        _ = damaged("versions/1.row_groups.parquet", index[:-1]).row_groups
    stamp = dataset.record.tokenizer.path
    changed = json.loads((root / stamp).read_text())
    changed["model"]["vocab"]["new"] = len(changed["model"]["vocab"])
    (root / dataset.record.row_groups_path).unlink()
    with pytest.raises(BadInput, match=r"row_groups.parquet is missing. The dataset is damaged: restore the file"):
        _ = Dataset(str(root)).row_groups
    with pytest.raises(
        BadInput, match=f"has fingerprint .* The version record says {dataset.record.tokenizer.fingerprint}"
    ):
        _ = damaged(stamp, json.dumps(changed).encode()).tokenizer
    with pytest.raises(BadInput, match="is not a tokenizer file"):
        _ = damaged(stamp, b"\xff").tokenizer
    (root / stamp).unlink()
    with pytest.raises(BadInput, match=f"{stamp} is missing"):
        _ = Dataset(str(root)).tokenizer


def test_damaged_data_files_are_named(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    path = Path(dataset.store.root) / "samples/part-00001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match=r"samples/part-00001.parquet cannot be read: .* restore the file"):
        dataset.read_row_group(3)
    path.unlink()
    with pytest.raises(BadInput, match=r"samples/part-00001.parquet is missing"):
        dataset.read_row_group(3)


@pytest.mark.parametrize("text", ["no json", "[]", "{}", '{"contract_version": 1}', '{"contract_version": 99}'])
def test_a_record_that_is_none_is_refused(make_dataset: MakeDataset, text: str) -> None:
    dataset = make_dataset()
    (Path(dataset.store.root) / "versions/1.json").write_text(text)
    with pytest.raises(BadInput, match=r"versions/1.json"):
        Dataset(dataset.store.uri)


def withdraw(dataset: Dataset, *numbers: int, path: str = "part-00000.parquet", row_group: int = 0) -> None:
    """Put samples of one row group on the list."""
    rows = [
        {
            "sample_id": f"{number:032x}",
            "samples_path": path,
            "row_group": row_group,
            "reason": "takedown",
            "withdrawn_at": 0,
        }
        for number in numbers
    ]
    assert append_withdrawn(dataset.store, pa.Table.from_pylist(rows, schema=WITHDRAWN), f"w{numbers[0]}-{row_group}")


def ids(table: pa.Table) -> list[int]:
    return [int(key, 16) for key in table["sample_id"].to_pylist()]


def test_withdrawn_rows_are_in_no_table_and_no_count(make_dataset: MakeDataset) -> None:
    dataset = make_dataset(unselected=(1, 5))
    withdraw(dataset, 0, 1)
    withdraw(dataset, 13, path="part-00001.parquet", row_group=0)
    opened = Dataset(dataset.store.uri)
    assert ids(opened.read_row_group(0)) == [2, 3]
    everything = opened.read_row_group(0, only_selected=False)
    assert ids(everything) == [2, 3]
    assert everything["selected"].to_pylist() == [True, True]
    assert ids(opened.read_row_group(3)) == [10, 11, 12]
    assert ids(opened.read_row_group(1)) == [4, 6, 7]
    assert opened.row_groups["selected"].to_pylist() == [2, 3, 2, 3, 4, 2, 4, 4, 2]
    assert opened.recorded_row_groups["selected"].to_pylist() == [3, 3, 2, 4, 4, 2, 4, 4, 2]
    assert opened.row_groups["rows"].to_pylist() == opened.recorded_row_groups["rows"].to_pylist()
    for place, selected in enumerate(opened.row_groups["selected"].to_pylist()):
        assert opened.read_row_group(place).num_rows == selected


def test_a_worker_sees_the_list_of_its_parent(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    withdraw(dataset, 0)
    parent = Dataset(dataset.store.uri)
    pickled = pickle.dumps(parent)
    withdraw(dataset, 2)
    worker = pickle.loads(pickled)
    assert worker.withdrawn.digest == parent.withdrawn.digest
    assert ids(worker.read_row_group(0)) == ids(parent.read_row_group(0)) == [1, 2, 3]
    assert worker.record == parent.record
    assert ids(worker.with_withdrawn(()).read_row_group(0)) == [0, 1, 2, 3]
    # Opened anew, both are gone; the one opened before anything was withdrawn has them still.
    assert ids(Dataset(dataset.store.uri).read_row_group(0)) == [1, 3]
    assert ids(dataset.read_row_group(0)) == [0, 1, 2, 3]


def test_only_affected_row_groups_are_read_for_the_counts(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    withdraw(dataset, 25, path="part-00002.parquet", row_group=1)
    for name in ("part-00000.parquet", "part-00001.parquet"):
        dataset.store.delete(f"annotations/{name}")
    assert Dataset(dataset.store.uri).row_groups["selected"].to_pylist() == [4, 4, 2, 4, 4, 2, 4, 3, 2]


def test_a_list_without_the_place_of_a_sample_never_shows_it(make_dataset: MakeDataset) -> None:
    """The counts cannot leave it out, so the row group is refused rather than shown or counted wrongly."""
    dataset = make_dataset()
    withdraw(dataset, 3, path="another.parquet")
    with pytest.raises(BadInput, match=r"row group 0 has 3 selected rows, the index says 4.*`coca data verify`"):
        Dataset(dataset.store.uri).read_row_group(0)


def test_a_damaged_list_opens_nothing(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    dataset.store.write("withdrawn/w.parquet", b"no parquet")
    with pytest.raises(BadInput, match=r"withdrawn/w.parquet cannot be read"):
        Dataset(dataset.store.uri).read_row_group(0)


def test_training_never_sees_what_is_withdrawn(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    from coca.decode import make_decoder
    from coca.feed import Feed
    from coca.mixture import Mixture, Source

    dataset = make_dataset()
    withdraw(dataset, 0, 3)
    withdraw(dataset, 28, 29, path="part-00002.parquet", row_group=2)
    opened = Dataset(dataset.store.uri)
    decoder = make_decoder(FeedConfig(decode="threads"), tiny_train.augment, tiny_train.seed)
    feed = Feed(Mixture([Source(opened)]), tiny_train, FeedConfig(), rank=0, world_size=1, decoder=decoder)
    seen = [row for number in range(12) for row in feed.batch(number).tokens_BT.tolist()]
    feed.close()
    numbers = {int(opened.tokenizer.decode(row).split()[-1]) for row in seen}
    assert numbers == set(range(30)) - {0, 3, 28, 29}


def test_columns_that_an_older_contract_did_not_have_are_null(make_dataset: MakeDataset) -> None:
    dataset = make_dataset()
    path = Path(dataset.store.root) / "samples/part-00000.parquet"
    table = pq.read_table(path).drop_columns("extra")
    pq.write_table(table, path, row_group_size=4)
    read = dataset.read_row_group(0, columns=("extra", "sample_id"))
    assert read.column_names == ["extra", "sample_id", "tokens"]
    assert read["extra"].to_pylist() == [None] * 4
    assert read.schema.field("extra").type == pa.string()
