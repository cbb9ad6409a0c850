"""Publishing: a batch's files and manifest, its commits in the order of the contract, the version record last."""

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from coca.contract import (
    ANNOTATIONS,
    LINKS,
    ROW_GROUPS,
    Reason,
    TableVersion,
    VersionRecord,
    link_bucket,
    row_groups_path,
    version_path,
)
from coca.errors import RunFailed
from coca.storage import Store
from pipelines.ledger import state_of
from pipelines.staging import Staging
from pipelines.tables import SCHEMAS, DataFile, commit_files, open_table, table_files

_WRITE_THREADS = 16
_COMMIT_ORDER = ("samples", "annotations", "links")


class BatchManifest(BaseModel):
    """Everything a batch commits; staged once all its data files lie in place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, list[DataFile]]
    """table -> files."""
    row_groups: list[dict[str, Any]]
    """Rows of ``contract.ROW_GROUPS``."""


def write_batch(
    staging: Staging,
    outcomes: dict[int, pa.Table],
    everything: pa.Table,
    duplicates: set[str],
    rows_per_row_group: int,
) -> BatchManifest:
    """Write the annotations and ledger files of a batch whose samples files are written, then its manifest.

    Args:
        outcomes: part number -> ``parts.OUTCOMES``, in the order of its samples file.
        everything: ``parts.OUTCOMES`` of the whole batch, also of pairs refused before any request.
        duplicates: sample ids that are stored but not selected.
    """
    if staging.dataset.exists(staging.manifest_path):
        return BatchManifest.model_validate_json(staging.dataset.read(staging.manifest_path))
    files: dict[str, list[DataFile]] = {"samples": [], "annotations": []}
    row_groups = []
    for part, table in sorted(outcomes.items()):
        admitted = table.filter(pc.is_null(table["reason"]))
        if admitted.num_rows == 0:
            continue
        annotations = _annotations(admitted, duplicates)
        data = _encode(annotations, rows_per_row_group)
        staging.dataset.write(staging.annotations_path(part), data)
        size = staging.dataset.size(staging.samples_path(part))
        name = staging.data_name(part)
        files["samples"].append(DataFile(path=name, size=size, rows=admitted.num_rows))
        files["annotations"].append(DataFile(path=name, size=len(data), rows=admitted.num_rows))
        row_groups += _row_group_rows(name, annotations, rows_per_row_group)
    files["links"] = _write_events(staging, everything)
    manifest = BatchManifest(files=files, row_groups=row_groups)
    staging.dataset.write(staging.manifest_path, manifest.model_dump_json().encode())
    return manifest


def commit_batch(staging: Staging, manifest: BatchManifest) -> None:
    """Commit a batch to the three tables; steps already done are passed over."""
    for name in _COMMIT_ORDER:
        if manifest.files[name]:
            commit_files(staging.dataset, name, manifest.files[name], staging.refresh_id, staging.batch)


def ledger_events(outcomes: pa.Table, refresh_id: str) -> pa.Table:
    """The events of outcomes (``contract.LINKS``)."""
    states = [state_of(Reason(reason) if reason else None).value for reason in outcomes["reason"].to_pylist()]
    columns = {
        **{name: outcomes[name] for name in LINKS.names if name in outcomes.column_names},
        "bucket": [link_bucket(url) for url in outcomes["url"].to_pylist()],
        "state": states,
        "refresh_id": [refresh_id] * outcomes.num_rows,
    }
    return pa.table({name: columns[name] for name in LINKS.names}).cast(LINKS)


def publish_version(
    store: Store, draft: dict[str, Any], row_groups: pa.Table, expected: dict[str, set[str]]
) -> VersionRecord:
    """Write the row-group index and, last, the version record: this is the commit.

    Args:
        draft: the record's fields but those that are counted here.
        row_groups: ``contract.ROW_GROUPS`` of the whole version, in any order.
        expected: table -> the files it must hold, no more and no less.

    Raises:
        RunFailed: another refresh has published this version, or has written to the tables meanwhile.
    """
    version = draft["version"]
    index = row_groups.sort_by([("samples_path", "ascending"), ("row_group", "ascending")])
    data = _encode(index.cast(ROW_GROUPS), max(1, index.num_rows))
    digest = hashlib.sha256(data).hexdigest()
    record = VersionRecord(
        **draft,
        **{name: _table_version(store, name, expected[name]) for name in SCHEMAS},
        selected=pc.sum(index["selected"]).as_py() or 0,
        row_groups_path=_write_index(store, version, data, digest),
        row_groups_sha256=digest,
    )
    if not store.write_once(version_path(version), record.model_dump_json(indent=1).encode()):
        raise RunFailed(
            f"another refresh has published version {version} of {store.uri} meanwhile; "
            "run the same command again to go on from it"
        )
    return record


def _annotations(admitted: pa.Table, duplicates: set[str]) -> pa.Table:
    ids = admitted["sample_id"].to_pylist()
    columns = {
        "sample_id": admitted["sample_id"],
        "tokens": admitted["tokens"],
        "language": pa.nulls(len(ids), pa.string()),
        "selected": [key not in duplicates for key in ids],
        "reason": pa.array([Reason.DUPLICATE_IMAGE.value if key in duplicates else None for key in ids], pa.string()),
    }
    return pa.table(columns).cast(ANNOTATIONS)


def _row_group_rows(name: str, annotations: pa.Table, rows_per_row_group: int) -> list[dict[str, Any]]:
    groups = []
    for number, start in enumerate(range(0, annotations.num_rows, rows_per_row_group)):
        group = annotations.slice(start, rows_per_row_group)
        selected = pc.sum(group["selected"]).as_py()
        groups.append(
            {
                "samples_path": name,
                "annotations_path": name,
                "row_group": number,
                "rows": group.num_rows,
                "selected": selected,
            }
        )
    return groups


def _write_events(staging: Staging, outcomes: pa.Table) -> list[DataFile]:
    """One file for each bucket that has events, without the partition column, as Delta has it."""
    events = ledger_events(outcomes, staging.refresh_id).sort_by([("bucket", "ascending"), ("sample_id", "ascending")])
    counts = pc.value_counts(events["bucket"].combine_chunks()).to_pylist()
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count["counts"])
    body = events.drop_columns("bucket")

    def write(place: int) -> DataFile:
        bucket, rows = counts[place]["values"], counts[place]["counts"]
        path = f"bucket={bucket}/{staging.data_prefix}.parquet"
        data = _encode(body.slice(starts[place], rows), rows)
        staging.dataset.write(f"links/{path}", data)
        return DataFile(path=path, size=len(data), rows=rows, bucket=bucket)

    with ThreadPoolExecutor(_WRITE_THREADS) as pool:
        return list(pool.map(write, range(len(counts))))


def _encode(table: pa.Table, rows_per_row_group: int) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=rows_per_row_group, compression="zstd")
    return buffer.getvalue()


def _table_version(store: Store, name: str, expected: set[str]) -> TableVersion:
    table = open_table(store, name)
    files = table_files(table)
    if files.keys() != expected:
        raise RunFailed(
            f"{store.uri}/{name} holds {len(files.keys() - expected)} files of others and lacks "
            f"{len(expected - files.keys())} of ours: another refresh runs on this dataset. "
            "Let it finish, then run the same command again"
        )
    return TableVersion(delta_version=table.version(), files=len(files), rows=sum(files.values()))


def _write_index(store: Store, version: int, data: bytes, digest: str) -> str:
    """Where the index lies: never over another one, which a record may name."""
    path = row_groups_path(version)
    if store.write_once(path, data) or store.read(path) == data:
        return path
    path = path.replace(".parquet", f".{digest[:16]}.parquet")
    store.write(path, data)
    return path
