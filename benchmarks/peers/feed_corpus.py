"""The photographs of benchmarks/feed.py in the forms that the sides read: a dataset version of ours, and tar shards."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from coca.contract import ANNOTATIONS, CONTRACT_VERSION, ROW_GROUPS, SAMPLES, VersionRecord
from coca.tokenizer import Tokenizer, train_bpe

ROWS_PER_FILE, ROWS_PER_ROW_GROUP, ROWS_PER_SHARD = 500, 250, 500


def read_bodies(folder: Path) -> Iterator[tuple[bytes, int, int]]:
    """(JPEG, width, height) of each photograph."""
    with (folder / "bodies.bin").open("rb") as bodies:
        for _, length, width, height in json.loads((folder / "bodies.json").read_text()):
            yield bodies.read(length), width, height


def write_shards(folder: Path, target: Path) -> None:
    """As webdataset reads them: <sample id>.jpg and .txt, some hundred a file."""
    target.mkdir()
    for number, (body, *_) in enumerate(read_bodies(folder)):
        if number % ROWS_PER_SHARD == 0:
            shard = tarfile.open(target / f"{number // ROWS_PER_SHARD:05d}.tar", "w")  # noqa: SIM115
        for suffix, data in (("jpg", body), ("txt", _caption(number).encode())):
            member = tarfile.TarInfo(f"{number:032x}.{suffix}")
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
        if (number + 1) % ROWS_PER_SHARD == 0:
            shard.close()
    shard.close()


def write_dataset(folder: Path, root: Path) -> None:
    """Version 1 with every photograph, in the data contract (coca/contract.py)."""
    for name in ("samples", "annotations", "versions", "tokenizers"):
        (root / name).mkdir(parents=True)
    tokenizer = train_bpe([_caption(number) for number in range(1000)], vocab_size=300)
    rows = [_sample(number, *body) for number, body in enumerate(read_bodies(folder))]
    groups = []
    for start in range(0, len(rows), ROWS_PER_FILE):
        name, part = f"part-{start // ROWS_PER_FILE:05d}.parquet", rows[start : start + ROWS_PER_FILE]
        _write(root / "samples" / name, part, SAMPLES)
        _write(root / "annotations" / name, _annotations(part, tokenizer), ANNOTATIONS)
        for number, first in enumerate(range(0, len(part), ROWS_PER_ROW_GROUP)):
            count = min(ROWS_PER_ROW_GROUP, len(part) - first)
            groups.append((name, name, number, count, count))
    _publish(root, tokenizer, groups, len(rows))


def _write(path: Path, rows: list[dict[str, object]], schema: pa.Schema) -> None:
    dictionaries = [name for name in schema.names if name not in ("image", "sample_id", "tokens")]
    codecs = {name: "none" if name == "image" else "zstd" for name in schema.names if name != "tokens"}
    if "tokens" in schema.names:
        codecs["tokens.list.element"] = "zstd"
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, row_group_size=ROWS_PER_ROW_GROUP, compression=codecs, use_dictionary=dictionaries)


def _sample(number: int, body: bytes, width: int, height: int) -> dict[str, object]:
    digest = hashlib.sha256(body).hexdigest()
    return {
        "sample_id": f"{number:032x}",
        "url": f"http://example.com/{number}",
        "caption": _caption(number),
        "image": body,
        "format": "jpeg",
        "width": width,
        "height": height,
        "original_width": width,
        "original_height": height,
        "source_sha256": digest,
        "sha256": digest,
        "phash": number,
        "fetched_at": 0,
    }


def _annotations(rows: list[dict[str, object]], tokenizer: Tokenizer) -> list[dict[str, object]]:
    tokens = tokenizer.encode([str(row["caption"]) for row in rows])
    pairs = zip(rows, tokens, strict=True)
    return [{"sample_id": row["sample_id"], "tokens": ids, "selected": True} for row, ids in pairs]


def _publish(root: Path, tokenizer: Tokenizer, groups: list[tuple[object, ...]], rows: int) -> None:
    index = [dict(zip(ROW_GROUPS.names, group, strict=True)) for group in groups]
    row_groups = root / "versions/1.row_groups.parquet"
    pq.write_table(pa.Table.from_pylist(index, schema=ROW_GROUPS), row_groups)
    stamp = f"tokenizers/{tokenizer.fingerprint}.json"
    (root / stamp).write_text(tokenizer.to_json())
    table = {"delta_version": 1, "files": len({group[0] for group in groups}), "rows": rows}
    record = VersionRecord.model_validate(
        {
            "version": 1,
            "parent": None,
            "created_at": "2026-01-01T00:00:00+00:00",
            "contract_version": CONTRACT_VERSION,
            "code_version": "benchmark",
            "refresh_id": "benchmark",
            "samples": table,
            "annotations": table,
            "links": table,
            "selected": rows,
            "rows_per_row_group": ROWS_PER_ROW_GROUP,
            "row_groups_path": "versions/1.row_groups.parquet",
            "row_groups_sha256": hashlib.sha256(row_groups.read_bytes()).hexdigest(),
            "tokenizer": {"fingerprint": tokenizer.fingerprint, "path": stamp, "vocab_size": tokenizer.vocab_size},
            "withdrawn_sha256": hashlib.sha256(b"").hexdigest(),
            "funnel": {},
            "config": {},
        }
    )
    (root / "versions/1.json").write_text(record.model_dump_json())


def _caption(number: int) -> str:
    return f"a photograph, number {number} of its kind"
