"""The versions of a dataset: what each is, and a new one made of an old one's parts."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow.compute as pc

from coca.code_version import code_version
from coca.contract import VersionRecord, version_path
from coca.dataset import Dataset, list_versions
from coca.errors import BadInput, RunFailed
from coca.storage import Store
from coca.withdrawn import Withdrawn, read_withdrawn
from pipelines.lease import Lease, hold_lease
from pipelines.vacuum import list_pins


@dataclass(frozen=True)
class VersionLine:
    """One version in a dataset's history."""

    version: int
    kind: str
    created_at: str
    parent: int | None
    selected: int
    """Selected samples as published, withdrawn ones counted."""
    stored: int
    selected_change: int | None
    """Against the parent; None where there is none or vacuum has dropped it."""
    stored_change: int | None
    withdrawn: int
    """Stored samples of this version that have been withdrawn since or before."""
    pinned: bool


def history(uri: str) -> list[VersionLine]:
    """All versions, ascending.

    Raises:
        BadInput: no dataset, or a record or index that cannot be read.
    """
    store = Dataset(uri).store
    pins, withdrawn = set(list_pins(store)), read_withdrawn(store)
    lines: dict[int, VersionLine] = {}
    for version in list_versions(store):
        dataset = Dataset(uri, version)
        record = dataset.record
        parent = lines.get(record.parent) if record.parent is not None else None
        lines[version] = VersionLine(
            version=version,
            kind=record.kind,
            created_at=record.created_at,
            parent=record.parent,
            selected=record.selected,
            stored=record.samples.rows,
            selected_change=record.selected - parent.selected if parent else None,
            stored_change=record.samples.rows - parent.stored if parent else None,
            withdrawn=_count_withdrawn(dataset, withdrawn),
            pinned=version in pins,
        )
    return list(lines.values())


def rollback(uri: str, to: int) -> VersionRecord:
    """Publish a version with exactly the rows of an older one. What has been withdrawn stays withdrawn.

    The next refresh takes the Delta tables back to it; until then only readers of the version record follow.

    Raises:
        BadInput: no such version, it is the latest already, or the dataset is being written.
    """
    target = Dataset(uri, to)
    with hold_lease(target.store, "coca data rollback") as lease:
        latest = Dataset(uri).record
        if latest.version == to:
            raise BadInput(f"version {to} is the latest of {target.store.uri} already", "`coca data history` lists all")
        _ = target.row_groups, target.tokenizer  # a version that cannot be read is no way back
        return publish_next(target.store, target.record, lease, kind="rollback", parent=to)


def publish_next(
    store: Store, base: VersionRecord, lease: Lease, *, kind: str, parent: int, **changes: Any
) -> VersionRecord:
    """Write the next version record: ``base`` but for what is given.

    Raises:
        RunFailed: the lease is lost, or somebody without one has published meanwhile.
    """
    number = list_versions(store)[-1] + 1
    record = base.model_copy(
        update={
            "version": number,
            "parent": parent,
            "kind": kind,
            "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "code_version": code_version(),
            "refresh_id": f"{kind}-{number}",
            "withdrawn_sha256": read_withdrawn(store).digest,
            **changes,
        }
    )
    lease.check()
    if not store.write_once(version_path(number), record.model_dump_json(indent=1).encode()):
        raise RunFailed(f"version {number} of {store.uri} was published by another process; run the same command again")
    return record


def _count_withdrawn(dataset: Dataset, withdrawn: Withdrawn) -> int:
    paths = pc.unique(dataset.recorded_row_groups["samples_path"])
    return pc.sum(pc.is_in(withdrawn.table["samples_path"].drop_null(), value_set=paths)).as_py() or 0
