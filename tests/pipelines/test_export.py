"""Exports read back with nothing but tarfile and pyarrow, and by what open_clip asks of a shard."""

import json
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.contract import SAMPLES
from coca.dataset import Dataset
from coca.errors import BadInput, RunFailed
from coca.storage import Store
from coca.withdrawn import WITHDRAWN, append_withdrawn
from pipelines import export
from pipelines.export import Stretch, export_dataset, plan_shards
from pipelines.import_shards import list_shards, read_shard

MakeDataset = Callable[..., Dataset]


def open_clip_samples(folder: Path) -> list[dict[str, bytes]]:
    """What its webdataset pipeline keeps: members grouped by what stands before the first dot, with image and txt."""
    samples: list[dict[str, bytes]] = []
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                if not samples or samples[-1]["__key__"] != key.encode():
                    samples.append({"__key__": key.encode()})
                samples[-1][suffix] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return [each for each in samples if "txt" in each and {"jpg", "png", "jpeg", "webp"} & set(each)]


def withdraw(dataset: Dataset, number: int, file: int, row_group: int) -> None:
    row = {"sample_id": f"{number:032x}", "samples_path": f"part-{file:05d}.parquet", "row_group": row_group}
    row |= {"reason": "url", "withdrawn_at": datetime(2026, 1, 1, tzinfo=UTC)}
    append_withdrawn(dataset.store, pa.Table.from_pylist([row], schema=WITHDRAWN), f"w{number}")


def test_shards_are_full_but_the_last() -> None:
    assert plan_shards([4, 0, 5, 1], 3) == [
        [Stretch(0, 0, 3)],
        [Stretch(0, 3, 4), Stretch(2, 0, 2)],
        [Stretch(2, 2, 5)],
        [Stretch(3, 0, 1)],
    ]
    assert plan_shards([2, 2], 10) == [[Stretch(0, 0, 2), Stretch(1, 0, 2)]]
    assert plan_shards([0], 10) == []


def test_webdataset_that_open_clip_reads(make_dataset: MakeDataset, make_sample: Callable, tmp_path: Path) -> None:
    dataset = make_dataset(unselected=(3, 11))
    withdraw(dataset, 6, 0, 1)
    out = tmp_path / "out"
    result = export_dataset(dataset.store.uri, str(out), "webdataset", samples_per_shard=8)
    assert (result.samples, result.shards, result.written, result.version) == (27, 4, 4, 1)
    assert result.bytes == sum(path.stat().st_size for path in out.glob("*.tar"))
    assert sorted(path.name for path in out.glob("*")) == [
        *(f"{n:05d}.tar" for n in range(4)),
        "_export",
        "sizes.json",
    ]
    kept = [make_sample(n) for n in range(30) if n not in (3, 6, 11)]
    found = open_clip_samples(out)
    assert [each["__key__"].decode() for each in found] == [sample["sample_id"] for sample in kept]
    assert [each["png"] for each in found] == [sample["image"] for sample in kept]
    assert [each["txt"].decode() for each in found] == [sample["caption"] for sample in kept]
    assert json.loads((out / "sizes.json").read_text()) == dict(
        zip((f"{n:05d}.tar" for n in range(4)), (8, 8, 8, 3), strict=True)
    )


def test_an_export_can_be_imported_again(make_dataset: MakeDataset, make_sample: Callable, tmp_path: Path) -> None:
    export_dataset(make_dataset().store.uri, str(tmp_path / "out"), "webdataset", samples_per_shard=16)
    rows = [row for shard in list_shards(str(tmp_path / "out")) for row in read_shard(shard)]
    names = ("url", "caption", "image", "source_sha256", "original_width")
    assert [(row.url, row.caption, row.body, row.source_sha256, row.original_width) for row in rows] == [
        tuple(make_sample(n)[name] for name in names) for n in range(30)
    ]
    assert {(row.status, row.extra) for row in rows} == {("success", None)}


def test_parquet_holds_samples_and_annotations(
    make_dataset: MakeDataset, make_sample: Callable, tmp_path: Path
) -> None:
    dataset = make_dataset(files=(5, 5), unselected=(2,))
    notes = dataset.store.path("annotations/part-00000.parquet")
    scored = pq.read_table(notes).drop(["scores", "language"]).append_column("language", [["en"] * 5])
    pq.write_table(scored, notes, row_group_size=4)  # as contract 1 wrote it: without scores
    result = export_dataset(dataset.store.uri, str(tmp_path / "out"), "parquet", samples_per_shard=6)
    assert result.shards == 2
    table = pq.read_table(tmp_path / "out")  # what starts with _ is no part of it for any reader
    assert table.column_names == [*SAMPLES.names, "tokens", "language", "scores"]
    kept = [n for n in range(10) if n != 2]
    assert table["image"].to_pylist() == [make_sample(n)["image"] for n in kept]
    assert table["tokens"].to_pylist() == [dataset.tokenizer.encode([make_sample(n)["caption"]])[0] for n in kept]
    assert table["language"].to_pylist() == ["en"] * 4 + [None] * 5
    assert table["scores"].null_count == 9


@pytest.mark.parametrize("form", ["webdataset", "parquet"])
def test_the_same_bytes_at_every_run(make_dataset: MakeDataset, tmp_path: Path, form: str) -> None:
    uri = make_dataset().store.uri
    for name in ("a", "b"):
        export_dataset(uri, str(tmp_path / name), form, samples_per_shard=7)  # type: ignore[arg-type]
    files = sorted(path.name for path in (tmp_path / "a").glob("0*"))
    assert len(files) == 5
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in files)


def test_it_goes_on_where_it_was_stopped(
    make_dataset: MakeDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, out = make_dataset().store.uri, tmp_path / "out"

    def write(tables: object, path: Path) -> None:
        whole[1](tables, path)
        if path.name.startswith(".00002"):
            raise RunFailed("stopped")

    whole = export._WRITERS["webdataset"]
    monkeypatch.setitem(export._WRITERS, "webdataset", ("tar", write))
    with pytest.raises(RunFailed):
        export_dataset(uri, str(out), "webdataset", samples_per_shard=8)
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    monkeypatch.setitem(export._WRITERS, "webdataset", whole)
    times = [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert export_dataset(uri, str(out), "webdataset", samples_per_shard=8).written == 2
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))][:2] == times
    assert export_dataset(uri, str(out), "webdataset", samples_per_shard=8).written == 0
    (out / "00001.tar").write_bytes(b"cut")
    assert export_dataset(uri, str(out), "webdataset", samples_per_shard=8).written == 1
    export_dataset(uri, str(tmp_path / "fresh"), "webdataset", samples_per_shard=8)
    assert all(path.read_bytes() == (tmp_path / "fresh" / path.name).read_bytes() for path in out.glob("*.tar"))


def test_withdrawals_after_an_export_reach_it(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset, out = make_dataset(files=(17,)), tmp_path / "out"
    assert export_dataset(dataset.store.uri, str(out), "webdataset", samples_per_shard=8).shards == 3
    (out / "_export/00002.json").unlink()  # as if it had been stopped right before
    withdraw(dataset, 9, 0, 2)
    result = export_dataset(dataset.store.uri, str(out), "webdataset", samples_per_shard=8)
    assert (result.samples, result.shards, result.written) == (16, 2, 1)
    assert sorted(path.name for path in out.glob("*.tar")) == ["00000.tar", "00001.tar"]
    assert f"{9:032x}" not in {each["__key__"].decode() for each in open_clip_samples(out)}
    assert json.loads((out / "sizes.json").read_text()) == {"00000.tar": 8, "00001.tar": 8}


def test_an_export_on_s3(make_dataset: MakeDataset, tmp_path: Path, s3: str) -> None:
    uri = make_dataset().store.uri
    export_dataset(uri, str(tmp_path / "out"), "webdataset", samples_per_shard=16)
    assert export_dataset(uri, f"{s3}/out", "webdataset", samples_per_shard=16).written == 2
    assert export_dataset(uri, f"{s3}/out", "webdataset", samples_per_shard=16).written == 0
    store = Store(f"{s3}/out")
    assert store.list() == ["00000.tar", "00001.tar", "_export", "sizes.json"]
    assert store.read("00001.tar") == (tmp_path / "out/00001.tar").read_bytes()


def test_what_is_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    uri = make_dataset(files=(3,)).store.uri
    export_dataset(uri, str(tmp_path / "out"), "webdataset")
    with pytest.raises(BadInput, match=r"holds an export of .*/dataset version 1 as webdataset, 10000 samples a shard"):
        export_dataset(uri, str(tmp_path / "out"), "parquet")
    with pytest.raises(BadInput, match="holds other files"):
        export_dataset(uri, uri, "webdataset")
    with pytest.raises(BadInput, match="has no version 7"):
        export_dataset(uri, str(tmp_path / "other"), "webdataset", version=7)
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=r"--to .*file is a file"):
        export_dataset(uri, str(tmp_path / "file"), "webdataset")


def test_a_version_without_a_selected_sample(make_dataset: MakeDataset, tmp_path: Path) -> None:
    uri = make_dataset(files=(2,), unselected=(0, 1)).store.uri
    with pytest.raises(BadInput, match="has no selected sample"):
        export_dataset(uri, str(tmp_path / "out"), "webdataset")
    assert not (tmp_path / "out").exists()
