"""The ledger after a selection: an event for each stored pair whose verdict has changed."""

from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads

from coca.contract import LINKS, TableVersion, VersionRecord
from coca.storage import Store
from pipelines.lease import Lease
from pipelines.ledger import latest_events
from pipelines.publish import write_events
from pipelines.staging import encode_table, read_table
from pipelines.tables import DataFile, commit_files, open_table, read_data_files, table_files
from pipelines.tasks import StartRay, run_tasks

# A pair with its new reason, null where it is selected now.
CHANGED = pa.schema([LINKS.field("bucket"), LINKS.field("sample_id"), LINKS.field("reason")])


@dataclass(frozen=True)
class _Bucket:
    name: str
    paths: tuple[str, ...]
    """Of its files in the links table."""


def write_verdicts(
    store: Store,
    record: VersionRecord,
    changed: list[str],
    folder: str,
    name: str,
    lease: Lease,
    start_ray: StartRay | None,
) -> TableVersion:
    """Append events with new reasons to the ledger, bucket by bucket; all else in them is as in the latest event.

    Args:
        changed: files of ``CHANGED`` in the dataset.
        folder: where the tasks find them sorted.
        name: of the rewrite, which is the events' ``refresh_id``; done before under it, nothing is added.

    Returns:
        The links table as the next version sees it.
    """
    rows = pa.concat_tables([CHANGED.empty_table(), *(read_table(store, path, CHANGED) for path in changed)])
    path, before = f"{folder}/changed.parquet", table_files(open_table(store, "links", record.links.delta_version))
    if rows.num_rows:
        store.write(path, encode_table(rows.sort_by("bucket"), 65_536))
        wanted = pc.unique(rows["bucket"]).sort().to_pylist()
        buckets = [
            _Bucket(bucket, tuple(file for file in sorted(before) if file.startswith(f"bucket={bucket}/")))
            for bucket in wanted
        ]
        written = run_tasks(partial(_write_bucket, store, path, name), buckets, start_ray=start_ray)
        files = [DataFile.model_validate(each) for some in written for each in some]
        if files:
            commit_files(store, "links", files, name, 0, lease=lease)
    table = open_table(store, "links")
    after = table_files(table)
    return TableVersion(delta_version=table.version(), files=len(after), rows=sum(after.values()))


def _write_bucket(store: Store, path: str, name: str, bucket: _Bucket) -> list[dict[str, Any]]:
    changed = pads.dataset(store.path(path), format="parquet", filesystem=store.filesystem, partitioning=None).to_table(
        filter=pads.field("bucket") == bucket.name
    )
    latest = latest_events(read_data_files(store, "links", list(bucket.paths)))
    # Stored pairs that came without links, such as imported ones, have no entry to keep up to date.
    places = pc.index_in(changed["sample_id"], value_set=latest["sample_id"].combine_chunks())
    known = pc.is_valid(places)
    reason, events = changed["reason"].filter(known), latest.take(places.filter(known))
    replaced = {
        "reason": reason,
        "attempts": pa.array([0] * events.num_rows, pa.int32()),
        # Just after the latest: nobody was asked, so that a link is due again when it was before.
        "event_at": pc.add(events["event_at"], timedelta(microseconds=1)),
    }
    for column, values in replaced.items():
        events = events.set_column(events.schema.get_field_index(column), LINKS.field(column), values)
    differs = pc.not_equal(pc.fill_null(reason, ""), pc.fill_null(latest["reason"].take(places.filter(known)), ""))
    events = events.filter(pc.and_(differs, events["stored"]))
    return [file.model_dump() for file in write_events(store, events, name, name)] if events.num_rows else []
