"""A small dataset with real Delta tables, two refreshes and a selection, for what looks at datasets."""

import hashlib
import io
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake.transaction import AddAction
from PIL import Image

from coca.contract import ANNOTATIONS, LINKS, ROW_GROUPS, SAMPLES, link_bucket, sample_id
from coca.storage import Store
from coca.withdrawn import WITHDRAWN, append_withdrawn
from pipelines.tables import DataFile, commit_files, create_tables, open_table, table_files

ROWS_PER_ROW_GROUP = 4
STARTED = datetime(2026, 3, 1, tzinfo=UTC)
SCRIPT = "<script>alert(1)</script> a $cat$"
FILES = {"aaaa": range(6), "bbbb": range(6, 10)}
UNSELECTED = {5: "duplicate_image", 7: "near_duplicate"}
RESELECTED = UNSELECTED | {8: "score"}


def url(number: int) -> str:
    return f"http://{('one', 'two', 'three')[number // 4]}.example/p{number}.png"


def caption(number: int) -> str:
    return SCRIPT if number == 3 else " ".join(["picture", str(number), *["of", "it"][: number % 3]])


def key(number: int) -> str:
    return sample_id(url(number), caption(number))


def picture(number: int) -> bytes:
    out = io.BytesIO()
    width = 64 * (1 + number % 3)
    Image.fromarray(np.full((64, width, 3), 20 * number, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def stored_row(number: int) -> dict[str, Any]:
    # Number 5 came with the bytes of number 2; number 7 is one bit from number 6.
    digest = hashlib.sha256(picture(2 if number == 5 else number)).hexdigest()
    return {
        "sample_id": key(number),
        "url": url(number),
        "caption": caption(number),
        "image": picture(number),
        "format": "png",
        "width": 64 * (1 + number % 3),
        "height": 64,
        "original_width": 640,
        "original_height": 640,
        "source_sha256": digest,
        "sha256": hashlib.sha256(picture(number)).hexdigest(),
        "phash": (6 << 20) + 1 if number == 7 else number << 20,
        "fetched_at": STARTED + timedelta(days=number),
        "extra": None,
    }


def note(number: int, unselected: dict[int, str]) -> dict[str, Any]:
    return {
        "sample_id": key(number),
        "tokens": list(range(number + 2)),
        "language": ("en", "en", "de", None)[number % 4],
        "selected": number not in unselected,
        "reason": unselected.get(number),
        "scores": None if number == 9 else [("clip", number / 10)],
    }


def event(address: str, text: str, refresh: str, **values: Any) -> dict[str, Any]:
    at = STARTED + timedelta(hours={"aaaa": 0, "bbbb": 1}[refresh])
    return {
        "bucket": link_bucket(address),
        "sample_id": sample_id(address, text),
        "url": address,
        "caption": text,
        "state": "ok",
        "attempts": 1,
        "refresh_id": refresh,
        "event_at": at,
        "stored": values.get("state", "ok") == "ok",
    } | values


def events() -> list[dict[str, Any]]:
    stored = [
        event(url(n), caption(n), refresh, status=200, source_sha256=stored_row(n)["source_sha256"])
        for refresh, numbers in FILES.items()
        for n in numbers
    ]
    slow = {"state": "transient", "reason": "timeout"}
    return [
        *stored,
        event("http://one.example/gone", "it is gone", "aaaa", state="dead", reason="not_found", status=404),
        event("http://two.example/slow", "it is slow", "aaaa", **slow, next_check_at=STARTED),
        event("javascript:alert(1)", "no web url", "aaaa", state="rejected", reason="invalid_url", attempts=0),
        event("http://10.0.0.1/x", "inside", "aaaa", state="blocked", reason="forbidden_address", attempts=0),
        event("http://two.example/slow", "it is slow", "bbbb", **slow, next_check_at=datetime(2999, 1, 1, tzinfo=UTC)),
        event("http://one.example/gone2", "gone too", "bbbb", state="dead", reason="not_found", status=410),
    ]


def publish_world(root: Path | str) -> str:
    """Versions 1 and 2 of two refreshes, and 3 of a selection that leaves number 8 out."""
    store = Store(root)
    create_tables(store)
    for batch, (refresh, numbers) in enumerate(FILES.items(), start=1):
        path = f"{refresh}-b00000-p00000.parquet"
        _commit(store, "samples", refresh, [(path, [stored_row(n) for n in numbers], None)])
        _commit(store, "annotations", refresh, [(path, [note(n, UNSELECTED) for n in numbers], None)])
        by_bucket: dict[str, list[dict[str, Any]]] = {}
        for row in events():
            if row["refresh_id"] == refresh:
                by_bucket.setdefault(row["bucket"], []).append(row)
        files = [(f"bucket={bucket}/{refresh}.parquet", rows, bucket) for bucket, rows in sorted(by_bucket.items())]
        _commit(store, "links", refresh, files)
        shown = {name: chosen for name, chosen in FILES.items() if name <= refresh}
        _record(store, batch, {f"{name}-b00000-p00000.parquet": chosen for name, chosen in shown.items()}, UNSELECTED)
    _select(store)
    return store.uri


def withdraw(uri: str, number: int) -> None:
    refresh = next(name for name, numbers in FILES.items() if number in numbers)
    row = {
        "sample_id": key(number),
        "url": url(number),
        "source_sha256": stored_row(number)["source_sha256"],
        "samples_path": f"{refresh}-b00000-p00000.parquet",
        "row_group": (number - FILES[refresh][0]) // ROWS_PER_ROW_GROUP,
        "reason": "takedown",
        "withdrawn_at": STARTED,
    }
    append_withdrawn(Store(uri), pa.Table.from_pylist([row], schema=WITHDRAWN), "test")


def _select(store: Store) -> None:
    actions, renamed = [], {}
    for refresh, numbers in FILES.items():
        path = f"{refresh}-v3.parquet"
        size = _write(store, "annotations", path, [note(n, RESELECTED) for n in numbers])
        stats = json.dumps({"numRecords": len(numbers)})
        actions.append(AddAction(path, size, {}, 0, True, stats))
        renamed[f"{refresh}-b00000-p00000.parquet"] = path
    open_table(store, "annotations").create_write_transaction(actions, mode="overwrite", schema=ANNOTATIONS)
    files = {f"{refresh}-b00000-p00000.parquet": numbers for refresh, numbers in FILES.items()}
    _record(store, 3, files, RESELECTED, renamed, kind="select")


def _commit(store: Store, name: str, refresh: str, files: list[tuple[str, list[dict[str, Any]], str | None]]) -> None:
    written = [
        DataFile(path=path, size=_write(store, name, path, rows), rows=len(rows), bucket=bucket)
        for path, rows, bucket in files
    ]
    commit_files(store, name, written, refresh, 0)


def _write(store: Store, name: str, path: str, rows: list[dict[str, Any]]) -> int:
    schema = {"samples": SAMPLES, "annotations": ANNOTATIONS, "links": LINKS.remove(0)}[name]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), buffer, row_group_size=ROWS_PER_ROW_GROUP)
    store.write(f"{name}/{path}", buffer.getvalue())
    return len(buffer.getvalue())


def _record(
    store: Store,
    version: int,
    files: dict[str, range],
    unselected: dict[int, str],
    renamed: dict[str, str] | None = None,
    kind: str = "refresh",
) -> None:
    groups = []
    for path, numbers in files.items():
        for index in range(0, len(numbers), ROWS_PER_ROW_GROUP):
            inside = numbers[index : index + ROWS_PER_ROW_GROUP]
            chosen = sum(n not in unselected for n in inside)
            notes = (renamed or {}).get(path, path)
            groups.append((path, notes, index // ROWS_PER_ROW_GROUP, len(inside), chosen))
    table = pa.Table.from_pylist([dict(zip(ROW_GROUPS.names, row, strict=True)) for row in groups], schema=ROW_GROUPS)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.write(f"versions/{version}.row_groups.parquet", buffer.getvalue())
    tables = {}
    for name in ("samples", "annotations", "links"):
        opened = open_table(store, name)
        rows = table_files(opened)
        tables[name] = {"delta_version": opened.version(), "files": len(rows), "rows": sum(rows.values())}
    record = {
        "version": version,
        "parent": version - 1 or None,
        "created_at": f"2026-03-0{version}T00:00:00+00:00",
        "contract_version": 2,
        "code_version": "test",
        "kind": kind,
        "refresh_id": list(FILES)[min(version, 2) - 1],
        **tables,
        "selected": sum(row[4] for row in groups),
        "rows_per_row_group": ROWS_PER_ROW_GROUP,
        "row_groups_path": f"versions/{version}.row_groups.parquet",
        "row_groups_sha256": hashlib.sha256(buffer.getvalue()).hexdigest(),
        "tokenizer": {"fingerprint": "0" * 16, "path": "tokenizers/none.json", "vocab_size": 300},
        "withdrawn_sha256": hashlib.sha256(b"").hexdigest(),
        "funnel": {"links": 12, "samples": 8, "rejected": {"not_found": 2, "timeout": 1, "duplicate_image": 1}},
        "config": {"fetch": {"allow_networks": []}},
    }
    store.write(f"versions/{version}.json", json.dumps(record).encode())
