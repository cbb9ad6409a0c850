"""Output of img2dataset 1.47 itself (tests/data/img2dataset), and what damage or malice make of it."""

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.errors import BadInput
from coca.storage import Store
from pipelines.img2dataset_shards import ImportedRow, list_shards, read_shard

REAL = Path(__file__).parents[1] / "data/img2dataset"


def read(source: object, **settings: int) -> list[ImportedRow]:
    return [row for shard in list_shards(str(source)) for row in read_shard(shard, **settings)]


def write_tar(path: Path, *members: tuple[str, bytes]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("form", ["parquet", "webdataset"])
def test_every_link_of_the_real_output(form: str) -> None:
    shards = [pickle.loads(pickle.dumps(shard)) for shard in list_shards(str(REAL / form))]
    assert [(shard.kind, shard.rows) for shard in shards] == [(form, 6), (form, 3)]
    rows = {row.url.rpartition("/")[2]: row for shard in shards for row in read_shard(shard) if row.url}
    assert {name: (row.status, row.error_message, row.extra) for name, row in rows.items()} == {
        "1.jpg": ("success", None, '{"score": 0.0}'),
        "2.png": ("success", None, '{"score": 0.25}'),
        "gone.jpg": ("failed_to_download", "HTTP Error 404: Not Found", '{"score": 0.5}'),
        "broken.jpg": ("failed_to_resize", "Image decoding error", '{"score": 0.75}'),
        "slow.jpg": ("failed_to_download", "timed out", '{"score": 1.0}'),
        "robots.jpg": (
            "failed_to_download",
            "Use of image disallowed by X-Robots-Tag directive",
            '{"score": 1.25}',
        ),
        "500.jpg": ("failed_to_download", "HTTP Error 500: Internal Server Error", '{"score": 1.5}'),
        "refused.jpg": ("failed_to_download", "<urlopen error [Errno 111] Connection refused>", '{"score": 9.0}'),
        "x.jpg": ("failed_to_download", "<urlopen error [Errno -2] Name or service not known>", '{"score": 8.0}'),
    }
    first = rows["2.png"]
    assert first.caption == 'größe of "two"'
    assert (first.original_width, first.original_height) == (70, 64)
    assert first.source_sha256 == "80ddc7234fd55ee56a3fbbfda9cd511d9a1bde24dc27a08d148f8e97dfdca84f"
    assert first.body is not None
    assert first.body.startswith(b"\xff\xd8\xff")
    assert rows["gone.jpg"].body is None
    assert rows["gone.jpg"].source_sha256 is None
    assert {row.imported_at for row in rows.values()} == {shard.written_at for shard in shards}


def test_both_outputs_hold_the_same() -> None:
    def content(form: str) -> list[tuple[object, ...]]:
        return sorted((str(row.url), row.caption, row.extra, row.body, row.source_sha256) for row in read(REAL / form))

    assert content("parquet") == content("webdataset")


def test_shards_on_s3(s3: str) -> None:
    for path in (REAL / "webdataset").iterdir():
        Store(s3).write(f"out/{path.name}", path.read_bytes())
    assert [row.status for row in read(f"{s3}/out")] == [row.status for row in read(REAL / "webdataset")]


def test_a_folder_without_shards(tmp_path: Path) -> None:
    (tmp_path / "links.csv").touch()
    for source in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BadInput, match="holds no img2dataset output"):
            list_shards(str(source))
    pq.write_table(pa.table({"url": ["u"], "caption": ["c"]}), tmp_path / "links.parquet")
    with pytest.raises(BadInput, match=r"links\.parquet holds no images: it has url, caption"):
        list_shards(str(tmp_path))


def test_unfinished_and_missing_shards(tmp_path: Path) -> None:
    folder = shutil.copytree(REAL / "webdataset", tmp_path / "out")
    (folder / "00001_stats.json").unlink()
    with pytest.raises(BadInput, match=r"did not finish 1 shards of .*, the first is 00001"):
        list_shards(str(folder))
    for name in ("00001.tar", "00001.parquet"):
        (folder / name).unlink()
    assert len(list_shards(str(folder))) == 1
    (folder / "00007_stats.json").touch()
    with pytest.raises(BadInput, match=r"has no shard 00007, though 00007_stats\.json says"):
        list_shards(str(folder))


def test_a_truncated_tar_is_named_after_its_rows(tmp_path: Path) -> None:
    folder = shutil.copytree(REAL / "webdataset", tmp_path / "out")
    (folder / "00000.tar").write_bytes((folder / "00000.tar").read_bytes()[:13_000])
    rows = read_shard(list_shards(str(folder))[0])
    assert next(rows).status == "success"
    with pytest.raises(BadInput, match=r"00000\.tar ends early at byte 13,000"):
        list(rows)
    (folder / "00001.parquet").write_bytes((folder / "00001.parquet").read_bytes()[:-9])
    with pytest.raises(BadInput, match=r"00001\.parquet cannot be read"):
        list_shards(str(folder))


def test_samples_of_a_tar_alone(tmp_path: Path) -> None:
    described = json.dumps({"url": "u", "original_width": "wide", "original_height": 1e99, "sha256": "../x"}).encode()
    write_tar(
        tmp_path / "0.tar",
        ("a/1.JPG", b"one"),
        ("a/1.txt", b"caption \xff"),
        ("a/1.json", described),
        ("a/1.cls", b"7"),
        ("b/1.jpg", b"no json"),
        ("2.json", b'{"url": "no image", "caption": 7, "status": "success", "score": NaN}'),
        ("3.json", b"[" * 50_000),
        ("3.png", b"deep"),
        ("3.png", b"again"),
        ("4.json", b'{"url": "\\ud800", "caption": "\\ud800", "x": "\\ud800", "status": ["success"]}'),
        ("4.webp", b"x" * 11),
    )
    rows = read(tmp_path, max_body_bytes=10)
    assert [(row.url, row.caption, row.body, row.status, row.extra) for row in rows] == [
        ("u", "caption �", b"one", None, None),
        (None, None, b"no json", None, None),
        ("no image", "7", None, "image_missing", '{"score": null}'),
        (None, None, b"deep", None, None),
        (None, None, b"again", None, None),
        ("?", "?", None, "body_too_large", '{"x": "?"}'),
    ]
    assert (rows[0].original_width, rows[0].original_height, rows[0].source_sha256) == (None, None, None)


def test_what_the_table_beside_a_tar_has_and_the_tar_has_not(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", ("k1.jpg", b"1"), ("k1.json", b'{"url": "u1", "key": "k1", "status": "success"}'))
    table = {"url": ["u1", "u2"], "key": ["k1", "k2"], "status": ["success", "success"]}
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    assert [(row.url, row.status) for row in read(tmp_path)] == [("u1", "success"), ("u2", "image_missing")]


def test_bodies_of_a_table(tmp_path: Path) -> None:
    table = {
        "url": ["u1", "u2", "u3"],
        "status": ["success", "success", "failed_to_download"],
        "jpg": [b"1" * 9, None, None],
    }
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    assert [row.status for row in read(tmp_path)] == ["success", "image_missing", "failed_to_download"]
    assert [row.body for row in read(tmp_path, max_body_bytes=8)] == [None, None, None]
    assert read(tmp_path, max_body_bytes=8)[0].status == "body_too_large"
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"url": bad, "jpg": [b"1"]}), tmp_path / "0.parquet")
    with pytest.raises(BadInput, match=r"0\.parquet cannot be read: .*UTF8"):
        read(tmp_path)
