"""Compacting the ledger: the many small files of a bucket become one. Every event stays."""

import io
import uuid
from dataclasses import dataclass

import pyarrow.parquet as pq

from coca.contract import CONTRACT_VERSION, TableVersion
from coca.dataset import Dataset
from coca.errors import RunFailed
from coca.progress import Progress
from coca.storage import Store
from pipelines.history import publish_next
from pipelines.lease import hold_lease
from pipelines.migrate import migrate_tables
from pipelines.tables import (
    DataFile,
    drop_foreign_files,
    file_sizes,
    open_table,
    read_data_files,
    replace_bucket,
    table_files,
)

_ROWS_PER_ROW_GROUP = 131_072


@dataclass(frozen=True)
class CompactResult:
    """What a compaction did to the ledger."""

    dataset: str
    version: int
    """The version published, or the latest where nothing was to be done."""
    buckets: int
    files_before: int
    files_after: int
    bytes_before: int
    bytes_after: int


def compact(uri: str, *, min_files: int = 2) -> CompactResult:
    """Merge the files of each bucket of the ledger that has ``min_files`` or more, and publish a version.

    Older versions keep their files until a vacuum. Memory holds the events of one bucket. A compaction that was killed
    leaves no trace in any version; the next one starts from the latest version again.

    Raises:
        BadInput: no dataset, or it is being written.
        RunFailed: the lease is lost.
    """
    store = Dataset(uri).store
    with hold_lease(store, "coca data compact") as lease:
        record = Dataset(uri).record
        before = file_sizes(open_table(store, "links", record.links.delta_version))
        buckets: dict[str, list[str]] = {}
        for path in sorted(before):
            buckets.setdefault(path.partition("/")[0], []).append(path)
        crowded = {folder: paths for folder, paths in buckets.items() if len(paths) >= max(2, min_files)}
        size = sum(size for size, _ in before.values())
        if not crowded:
            return CompactResult(store.uri, record.version, 0, len(before), len(before), size, size)
        name = f"compact-{uuid.uuid4().hex}"
        drop_foreign_files(store, "links", record.links.delta_version, name, lease=lease)
        migrate_tables(store, lease)
        with Progress("compact", total=len(crowded), unit="buckets") as progress:
            for folder, paths in crowded.items():
                merged = _merge(store, folder, paths, name)
                if merged.rows != sum(before[path][1] for path in paths):
                    raise RunFailed(
                        f"{store.uri}/links/{folder} has lost rows since its commit; see `coca data verify`"
                    )
                replace_bucket(store, merged, lease)
                progress.advance()
        table = open_table(store, "links")
        after = file_sizes(table)
        links = TableVersion(delta_version=table.version(), files=len(after), rows=sum(table_files(table).values()))
        record = publish_next(
            store,
            record,
            lease,
            kind="compact",
            parent=record.version,
            links=links,
            contract_version=CONTRACT_VERSION,
        )
        return CompactResult(
            dataset=store.uri,
            version=record.version,
            buckets=len(crowded),
            files_before=len(before),
            files_after=len(after),
            bytes_before=size,
            bytes_after=sum(size for size, _ in after.values()),
        )


def _merge(store: Store, folder: str, paths: list[str], name: str) -> DataFile:
    """Write the events of a bucket as one file, sorted by pair and time."""
    events = read_data_files(store, "links", paths).sort_by([("sample_id", "ascending"), ("event_at", "ascending")])
    buffer = io.BytesIO()
    pq.write_table(events, buffer, row_group_size=_ROWS_PER_ROW_GROUP, compression="zstd")
    path = f"{folder}/{name}.parquet"
    store.write(f"links/{path}", buffer.getvalue())
    size = buffer.getbuffer().nbytes
    return DataFile(path=path, size=size, rows=events.num_rows, bucket=folder.removeprefix("bucket="))
