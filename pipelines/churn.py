"""What changed from one version of a dataset to the next, from their records and row-group indexes alone."""

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import VersionRecord
from coca.dataset import Dataset
from coca.errors import BadInput
from coca.storage import Store


@dataclass(frozen=True)
class Change:
    """A version beside the one it was made from."""

    version: int
    parent: int | None
    kind: str
    created_at: str
    added: int
    """Rows in samples files that the parent does not have."""
    removed: int
    """Rows in samples files that only the parent has."""
    reselected: int
    """Rows whose samples file stays and whose annotations file is another: selected or tokenized anew."""
    selected: int
    selected_change: int
    withdrawn_changed: bool
    """Whether the list of withdrawals grew in between; it counts for every version, whenever it is read."""
    funnel_links: int | None
    """Links that the refresh was given; None where the version is no refresh."""


def compare(new: Dataset, old: Dataset | None) -> Change:
    """By whole files, which are never changed once they are committed."""
    here, there = new.recorded_row_groups, old.recorded_row_groups if old else None
    added = here if there is None else _not_in(here, there, "samples_path")
    removed = 0 if there is None else _rows(_not_in(there, here, "samples_path"))
    kept = (
        None if there is None else here.filter(pc.is_in(here["samples_path"], value_set=_values(there, "samples_path")))
    )
    reselected = 0 if kept is None or there is None else _rows(_not_in(kept, there, "annotations_path"))
    record = new.record
    return Change(
        version=record.version,
        parent=old.record.version if old else None,
        kind=record.kind,
        created_at=record.created_at,
        added=_rows(added),
        removed=removed,
        reselected=reselected,
        selected=record.selected,
        selected_change=record.selected - (old.record.selected if old else 0),
        withdrawn_changed=old is not None and record.withdrawn_sha256 != old.record.withdrawn_sha256,
        funnel_links=_links(record),
    )


def churn(dataset: Dataset, limit: int = 30) -> list[Change]:
    """The changes that led to a version, oldest first, at most ``limit``; parents that are gone end the chain."""
    changes: list[Change] = []
    current: Dataset | None = dataset
    while current is not None and len(changes) < limit:
        parent = _parent(current.store, current.record)
        changes.append(compare(current, parent))
        current = parent
    return changes[::-1]


def _parent(store: Store, record: VersionRecord) -> Dataset | None:
    if record.parent is None:
        return None
    try:
        parent = Dataset(store.uri, record.parent)
        _ = parent.recorded_row_groups
    except BadInput:
        return None
    return parent


def _not_in(table: pa.Table, other: pa.Table, column: str) -> pa.Table:
    return table.filter(pc.invert(pc.is_in(table[column], value_set=_values(other, column))))


def _values(table: pa.Table, column: str) -> pa.Array:
    return table[column].unique()


def _rows(table: pa.Table) -> int:
    return pc.sum(table["rows"]).as_py() or 0


def _links(record: VersionRecord) -> int | None:
    links = record.funnel.get("links")
    return links if record.kind == "refresh" and isinstance(links, int) else None
