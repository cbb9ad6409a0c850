"""The two forms of an exported shard, written to a local file: a webdataset tar, and Parquet."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from coca.contract import ANNOTATIONS, SAMPLES

# open_clip's pipeline takes these members as the image: jpg;png;jpeg;webp (open_clip_train/data.py).
EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}

EXPORTED = pa.schema([*SAMPLES, *(ANNOTATIONS.field(name) for name in ("tokens", "language", "scores"))])
_OTHERS = [field.name for field in EXPORTED if field.name not in ("image", "tokens", "scores")]
_NESTED = ["tokens.list.element", "scores.key_value.key", "scores.key_value.value"]
# A tar's .json has the names of img2dataset, so that it can be imported again; sha256 is that of the fetched bytes.
_AS_IMG2DATASET = ("url", "caption", "width", "height", "original_width", "original_height")
_OF_OUR_OWN = ("sample_id", "format", "phash", "language")


def write_tar(tables: Iterator[pa.Table], path: Path) -> None:
    """``<sample_id>.jpg`` (or png, webp), ``.json`` and ``.txt`` of each row of ``EXPORTED``; always the same bytes."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for table in tables:
            for row in table.to_pylist():
                key = row["sample_id"]
                _add(tar, f"{key}.{EXTENSIONS[row['format']]}", row["image"])
                _add(tar, f"{key}.json", _describe(row).encode())
                _add(tar, f"{key}.txt", row["caption"].encode())


def write_parquet(tables: Iterator[pa.Table], path: Path) -> None:
    """Rows of ``EXPORTED``, one row group for each table; images are not compressed again."""
    with pq.ParquetWriter(
        path,
        EXPORTED,
        compression={**dict.fromkeys([*_OTHERS, *_NESTED], "zstd"), "image": "none"},
        use_dictionary=_OTHERS,
    ) as writer:
        for table in tables:
            writer.write_table(table.select(EXPORTED.names).cast(EXPORTED))


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # no time, no owner: the bytes depend on the rows alone
    member.size = len(data)
    member.mode = 0o644
    tar.addfile(member, io.BytesIO(data))


def _describe(row: dict[str, Any]) -> str:
    ours = {name: row[name] for name in _OF_OUR_OWN}
    ours["fetched_at"] = row["fetched_at"].isoformat()
    ours["stored_sha256"] = row["sha256"]
    ours["scores"] = dict(row["scores"]) if row["scores"] else None
    ours["extra"] = json.loads(row["extra"]) if row["extra"] else None
    values = {name: row[name] for name in _AS_IMG2DATASET}
    values |= {"key": row["sample_id"], "status": "success", "sha256": row["source_sha256"], "coca": ours}
    return json.dumps(values, sort_keys=True, ensure_ascii=False)
