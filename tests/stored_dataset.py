"""A published dataset with its Delta tables, for tests of what rewrites annotations. Pictures are real PNG files."""

import hashlib
import io
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from coca.contract import (
    ANNOTATIONS,
    CONTRACT_VERSION,
    LINKS,
    SAMPLES,
    TableVersion,
    TokenizerStamp,
    VersionRecord,
    link_bucket,
    sample_id,
    version_path,
)
from coca.dataset import Dataset
from coca.images import phash
from coca.storage import Store
from coca.tokenizer import Tokenizer
from pipelines.annotations import row_groups_of, write_annotations
from pipelines.publish import write_events
from pipelines.row_group_index import write_row_groups
from pipelines.tables import DataFile, commit_files, create_tables, open_table

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROWS_PER_ROW_GROUP = 4


def picture(name: str, quality: int | None = None) -> bytes:
    """A picture of its own for each name; with ``quality`` as a JPEG that looks the same."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    coarse = np.random.default_rng(seed).integers(0, 255, (5, 5, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((80, 64), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if quality is None else "JPEG", **({} if quality is None else {"quality": quality}))
    return buffer.getvalue()


def row(name: str, caption: str, data: bytes | None = None, **note: Any) -> dict[str, Any]:
    """A stored pair; ``note`` overrides its annotation."""
    data = picture(name) if data is None else data
    url = f"http://example.com/{name}"
    image = Image.open(io.BytesIO(data)).convert("RGB")
    return {
        "sample_id": sample_id(url, caption),
        "url": url,
        "caption": caption,
        "image": data,
        "format": "png" if data.startswith(b"\x89PNG") else "jpeg",
        "width": image.width,
        "height": image.height,
        "original_width": image.width,
        "original_height": image.height,
        "source_sha256": hashlib.sha256(data).hexdigest(),
        "sha256": hashlib.sha256(data).hexdigest(),
        "phash": phash(image),
        "fetched_at": NOW,
        "note": {"language": "en", "selected": True, "reason": None, "scores": None, **note},
    }


def publish(root: Path | str, tokenizer: Tokenizer, *files: list[dict[str, Any]], config: dict[str, Any]) -> Dataset:
    """Version 1 with the given rows, each file's in the order of their ids, and an ``ok`` event for each pair."""
    store = Store(root)
    create_tables(store)
    samples, notes, events = [], [], []
    for number, rows in enumerate(files):
        ordered = sorted(rows, key=lambda each: str(each["sample_id"]))
        name = f"first-p{number:05d}.parquet"
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(ordered, schema=SAMPLES), buffer, row_group_size=ROWS_PER_ROW_GROUP)
        store.write(f"samples/{name}", buffer.getvalue())
        samples.append(DataFile(path=name, size=buffer.getbuffer().nbytes, rows=len(ordered)))
        tokens = tokenizer.encode([each["caption"] for each in ordered])
        annotated = [
            {"sample_id": each["sample_id"], "tokens": ids, **each["note"]}
            for each, ids in zip(ordered, tokens, strict=True)
        ]
        table = pa.Table.from_pylist(annotated, schema=ANNOTATIONS)
        notes.append(write_annotations(store, name, table, ROWS_PER_ROW_GROUP, samples_path=name))
        events += [_event(each) for each in ordered]
    links = write_events(store, pa.Table.from_pylist(events, schema=LINKS), "first", "first")
    commit_files(store, "samples", samples, "first", 0)
    commit_files(store, "annotations", [each.file for each in notes], "first", 0)
    commit_files(store, "links", links, "first", 0)
    path, digest = write_row_groups(store, 1, row_groups_of(notes))
    stamp = f"tokenizers/{tokenizer.fingerprint}.json"
    store.write(stamp, tokenizer.to_json().encode())
    record = VersionRecord(
        version=1,
        parent=None,
        created_at=NOW.isoformat(),
        contract_version=CONTRACT_VERSION,
        code_version="test",
        refresh_id="first",
        samples=_version(store, "samples", samples),
        annotations=_version(store, "annotations", [each.file for each in notes]),
        links=_version(store, "links", links),
        selected=sum(each["note"]["selected"] for rows in files for each in rows),
        rows_per_row_group=ROWS_PER_ROW_GROUP,
        row_groups_path=path,
        row_groups_sha256=digest,
        tokenizer=TokenizerStamp(fingerprint=tokenizer.fingerprint, path=stamp, vocab_size=tokenizer.vocab_size),
        withdrawn_sha256=hashlib.sha256(b"").hexdigest(),
        funnel={"links": 0, "samples": 0, "rejected": {}},
        config=config,
    )
    assert store.write_once(version_path(1), record.model_dump_json().encode())
    return Dataset(store.uri)


def snapshot(root: Path, *folders: str) -> dict[str, bytes]:
    """Every file below some folders, with its bytes."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for folder in folders
        for path in sorted((root / folder).rglob("*"))
        if path.is_file()
    }


def annotations(dataset: Dataset) -> dict[str, dict[str, Any]]:
    """The annotation of every stored pair by its caption, read by the row-group index."""
    found = {}
    for group in dataset.recorded_row_groups.to_pylist():
        tables = []
        for folder, key in (("samples", "samples_path"), ("annotations", "annotations_path")):
            with dataset.store.filesystem.open_input_file(dataset.store.path(f"{folder}/{group[key]}")) as source:
                tables.append(pq.ParquetFile(source).read_row_group(group["row_group"]).to_pylist())
        assert len(tables[0]) == len(tables[1]) == group["rows"]
        for sample, note in zip(*tables, strict=True):
            assert sample["sample_id"] == note["sample_id"]
            found[sample["caption"]] = note
        assert sum(note["selected"] for note in tables[1]) == group["selected"]
    return found


def _event(each: dict[str, Any]) -> dict[str, Any]:
    return {
        **{name: each[name] for name in ("sample_id", "url", "caption", "source_sha256")},
        "bucket": link_bucket(each["url"]),
        "state": "changed" if each["url"].endswith("changed") else "ok",
        "reason": each["note"]["reason"],
        "status": 200,
        "attempts": 1,
        "etag": "abc",
        "last_modified": None,
        "refresh_id": "first",
        "event_at": NOW,
        "next_check_at": NOW + timedelta(days=30),
        "stored": True,
    }


def _version(store: Store, name: str, files: list[DataFile]) -> TableVersion:
    version = open_table(store, name).version()
    return TableVersion(delta_version=version, files=len(files), rows=sum(file.rows for file in files))
