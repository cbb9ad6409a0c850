import io
import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.export_formats import EXPORTED, write_parquet, write_tar

ROW = {
    "sample_id": "ab",
    "url": "http://a/",
    "caption": "größe",
    "image": b"webp bytes",
    "format": "webp",
    "width": 3,
    "height": 4,
    "original_width": 30,
    "original_height": 40,
    "source_sha256": "s" * 64,
    "sha256": "t" * 64,
    "phash": -5,
    "fetched_at": datetime(2026, 1, 2, tzinfo=UTC),
    "extra": '{"width": 99, "z": 1}',
    "tokens": [1, 2],
    "language": "de",
    "scores": [("clip", 0.5)],
}


def tables() -> list[pa.Table]:
    return [pa.Table.from_pylist([ROW, {**ROW, "sample_id": "ac", "format": "jpeg"}], schema=EXPORTED)]


def test_members_and_metadata_of_a_tar(tmp_path: Path) -> None:
    write_tar(iter(tables()), tmp_path / "0.tar")
    with tarfile.open(tmp_path / "0.tar") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        assert {(member.mtime, member.uid, member.gid, member.uname, member.mode) for member in tar} == {
            (0, 0, 0, "", 0o644)
        }
    assert list(members) == ["ab.webp", "ab.json", "ab.txt", "ac.jpg", "ac.json", "ac.txt"]
    assert members["ab.webp"] == b"webp bytes"
    assert members["ab.txt"].decode() == "größe"
    assert json.loads(members["ab.json"]) == {
        "key": "ab",
        "status": "success",
        "url": "http://a/",
        "caption": "größe",
        "width": 3,
        "height": 4,
        "original_width": 30,
        "original_height": 40,
        "sha256": "s" * 64,
        "coca": {
            "sample_id": "ab",
            "format": "webp",
            "phash": -5,
            "language": "de",
            "fetched_at": "2026-01-02T00:00:00+00:00",
            "stored_sha256": "t" * 64,
            "scores": {"clip": 0.5},
            "extra": {"width": 99, "z": 1},
        },
    }


def test_parquet_keeps_every_column_and_does_not_compress_images(tmp_path: Path) -> None:
    write_parquet(iter(tables() * 2), tmp_path / "0.parquet")
    data = (tmp_path / "0.parquet").read_bytes()
    file = pq.ParquetFile(io.BytesIO(data))
    assert file.read().equals(pa.concat_tables(tables() * 2))
    assert file.num_row_groups == 2
    group = file.metadata.row_group(0)
    codecs = {group.column(n).path_in_schema: group.column(n).compression for n in range(group.num_columns)}
    assert codecs.pop("image") == "UNCOMPRESSED"
    assert set(codecs.values()) == {"ZSTD"}
