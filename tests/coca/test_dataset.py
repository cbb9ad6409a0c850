"""Opening a dataset: whole, or refused with the file and the way out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from coca.dataset import Dataset
from coca.errors import BadInput

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
