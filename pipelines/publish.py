"""Publishing: a batch's ledger files and manifest, its commits in the contract's order, the version record last."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from coca.contract import (
    LINKS,
    State,
    TableVersion,
    VersionRecord,
    link_bucket,
    version_path,
)
from coca.errors import RunFailed
from coca.storage import Store
from pipelines.lease import Lease
from pipelines.outcomes import OUTCOMES, admitted_rows, verdict_counts
from pipelines.row_group_index import write_row_groups
from pipelines.staging import Staging, encode_table
from pipelines.tables import SCHEMAS, DataFile, commit_files, open_table, table_files

_WRITE_THREADS = 16


class BatchManifest(BaseModel):
    """Everything a batch commits; staged once all its data files lie in place."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: list[DataFile]
    links: list[DataFile]
    parts: list[int]
    """Parts that were done; the others wait for a later refresh."""
    counts: dict[str, int]
    """Reason ("" for what is stored) -> rows of the links table."""
    requests: int
    bytes: int
    opted_out: list[str]
    """Urls with stored pairs whose owners have opted out since."""


def write_batch(staging: Staging, batch: int, parts: list[int], refused: pa.Table) -> BatchManifest:
    """Write the ledger files of a batch whose parts are written, then its manifest.

    Args:
        refused: ``OUTCOMES`` of the pairs that are refused before any request.
    """
    samples, events = [], [refused]
    for part in sorted(parts):
        outcomes = staging.read_table(staging.outcome_path(batch, part), OUTCOMES)
        events.append(outcomes)
        rows = admitted_rows(outcomes).num_rows
        if rows:
            size = staging.dataset.size(staging.samples_path(batch, part))
            samples.append(DataFile(path=staging.data_name(batch, part), size=size, rows=rows))
    everything = pa.concat_tables(events)
    manifest = BatchManifest(
        samples=samples,
        links=write_events(staging.dataset, everything, staging.refresh_id, staging.data_prefix(batch)),
        parts=sorted(parts),
        counts=verdict_counts(everything),
        requests=pc.sum(everything["requests"]).as_py() or 0,
        bytes=pc.sum(everything["bytes"]).as_py() or 0,
        opted_out=_opted_out_urls(everything),
    )
    staging.dataset.write(staging.manifest_path(batch), manifest.model_dump_json().encode())
    return manifest


def read_manifest(staging: Staging, batch: int) -> BatchManifest | None:
    path = staging.manifest_path(batch)
    if not staging.dataset.exists(path):
        return None
    return BatchManifest.model_validate_json(staging.dataset.read(path))


def commit_batch(staging: Staging, batch: int, manifest: BatchManifest, lease: Lease | None) -> None:
    """Commit the samples and the ledger of a batch; steps already done are passed over."""
    for name, files in (("samples", manifest.samples), ("links", manifest.links)):
        if files:
            commit_files(staging.dataset, name, files, staging.refresh_id, batch, lease=lease)


def _opted_out_urls(outcomes: pa.Table) -> list[str]:
    opted_out = pc.and_(pc.equal(outcomes["state"], State.OPTED_OUT.value), outcomes["url_stored"])
    return sorted(pc.unique(outcomes["url"].filter(opted_out)).to_pylist())


def write_events(store: Store, events: pa.Table, refresh_id: str, prefix: str) -> list[DataFile]:
    """Write ledger events, a file for each bucket that has any, without the partition column, as Delta has it.

    Args:
        events: the columns of ``contract.LINKS`` but ``bucket`` and ``refresh_id``; others are left out.
        prefix: how the names of the files begin; the same rows under the same prefix are the same files.
    """
    buckets = [link_bucket(url) for url in events["url"].to_pylist()]
    known = {"bucket": pa.array(buckets, pa.string()), "refresh_id": pa.array([refresh_id] * events.num_rows)}
    table = pa.table({name: known[name] if name in known else events[name] for name in LINKS.names})
    ordered = table.cast(LINKS).sort_by([("bucket", "ascending"), ("sample_id", "ascending")])
    counts = pc.value_counts(ordered["bucket"].combine_chunks()).to_pylist()
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count["counts"])
    body = ordered.drop_columns("bucket")

    def write(place: int) -> DataFile:
        bucket, rows = counts[place]["values"], counts[place]["counts"]
        path = f"bucket={bucket}/{prefix}.parquet"
        data = encode_table(body.slice(starts[place], rows))
        store.write(f"links/{path}", data)
        return DataFile(path=path, size=len(data), rows=rows, bucket=bucket)

    with ThreadPoolExecutor(_WRITE_THREADS) as pool:
        return list(pool.map(write, range(len(counts))))


def publish_version(
    store: Store, draft: dict[str, Any], row_groups: pa.Table, expected: dict[str, set[str]], lease: Lease | None = None
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
    tables = {name: _table_version(store, name, expected[name]) for name in SCHEMAS}
    path, digest = write_row_groups(store, version, row_groups)
    record = VersionRecord(
        **draft,
        **tables,
        selected=pc.sum(row_groups["selected"]).as_py() or 0,
        row_groups_path=path,
        row_groups_sha256=digest,
    )
    if lease is not None:
        lease.check()
    if not store.write_once(version_path(version), record.model_dump_json(indent=1).encode()):
        raise RunFailed(
            f"another refresh has published version {version} of {store.uri} meanwhile; "
            "run the same command again to go on from it"
        )
    return record


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
