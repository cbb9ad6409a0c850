"""Vacuum: versions that nobody needs go, with every file that only they have."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow.fs as pafs

from coca.contract import VersionRecord, version_path
from coca.dataset import Dataset, list_versions
from coca.errors import BadInput
from coca.progress import Progress
from coca.storage import Store
from pipelines.lease import FOLDER as LEASES
from pipelines.lease import Lease, hold_lease, list_epochs
from pipelines.tables import SCHEMAS, drop_foreign_files, open_table, table_files

PINS = "pins"
_DAY_S = 86_400.0
# A folder in which a file may lie that no version needs. Delta logs and the withdrawn list are never looked at.
_SWEPT = (*SCHEMAS, "versions", "tokenizers", LEASES)


@dataclass(frozen=True)
class VacuumResult:
    """What a vacuum deleted, or would delete."""

    dataset: str
    kept: list[int]
    pinned: list[int]
    dropped: list[int]
    files: list[str]
    """Relative to the dataset, in the order of deletion."""
    bytes: int
    dry_run: bool


def vacuum(
    uri: str,
    *,
    keep: int = 10,
    pin: Iterable[int] = (),
    unpin: Iterable[int] = (),
    staging_days: float = 7.0,
    dry_run: bool = False,
) -> VacuumResult:
    """Delete versions, and files that belong to no version kept: the last ``keep`` and all that are pinned.

    The state of a refresh that was killed stays for ``staging_days`` after its last write, for it can go on. No entry
    of a Delta log is deleted, so a version kept can be opened and restored.

    Raises:
        BadInput: no dataset, no such version to pin, or the dataset is being written.
    """
    if keep < 1:
        raise BadInput(f"--keep {keep} would keep no version", "Keep 1 or more: the latest always stays")
    store = Dataset(uri).store
    if dry_run:
        pinned = set(list_pins(store)) | set(_known(store, pin)) - set(unpin)
        return _sweep(store, keep, pinned, staging_days, lease=None)
    with hold_lease(store, "coca data vacuum") as lease:
        _set_pins(store, _known(store, pin), unpin)
        return _sweep(store, keep, set(list_pins(store)), staging_days, lease)


def list_pins(store: Store) -> list[int]:
    """Versions that no vacuum drops, ascending."""
    names = (name.removesuffix(".json") for name in store.list(PINS) if name.endswith(".json"))
    return sorted(int(name) for name in names if name.isdecimal())


def _known(store: Store, versions: Iterable[int]) -> list[int]:
    wanted, there = list(versions), list_versions(store)
    for version in wanted:
        if version not in there:
            known = ", ".join(map(str, there[-8:]))
            raise BadInput(f"{store.uri} has no version {version} to pin", f"It has {known}")
    return wanted


def _set_pins(store: Store, pin: Iterable[int], unpin: Iterable[int]) -> None:
    for version in unpin:
        store.delete(f"{PINS}/{version}.json")
    for version in pin:
        stamp = {"pinned_at": datetime.now(UTC).isoformat(timespec="seconds")}
        store.write_once(f"{PINS}/{version}.json", json.dumps(stamp).encode())


def _sweep(store: Store, keep: int, pinned: set[int], staging_days: float, lease: Lease | None) -> VacuumResult:
    versions = list_versions(store)
    kept = sorted({*versions[-keep:], *(pinned & set(versions))})
    records = [Dataset(store.uri, version).record for version in kept]
    needed = _needed_files(store, records)
    live = _live_refreshes(store, staging_days)
    doomed: dict[str, int] = {}
    # Records first: a kill between leaves files without a version, never a version without files.
    dropped = [version for version in versions if version not in kept]
    sizes = {folder: _sizes(store, folder) for folder in (*_SWEPT, "staging")}
    doomed |= {version_path(version): sizes["versions"][version_path(version)] for version in dropped}
    doomed |= {path: size for path, size in sizes["staging"].items() if path.split("/")[1] not in live}
    for folder in _SWEPT:
        for path, size in sizes[folder].items():
            ours = path.rpartition("/")[2].startswith(tuple(live))
            if path not in needed and path not in doomed and not (ours and folder in SCHEMAS):
                doomed[path] = size
    if lease is not None:
        for name in SCHEMAS:
            # A table may hold files of a refresh that will never go on; its log must not name what is deleted.
            published = getattr(records[-1], name).delta_version
            drop_foreign_files(store, name, published, tuple(sorted(live)), lease=lease)
        _delete(store, list(doomed), lease)
        lease.check()
        for folder in (*SCHEMAS, "versions", "tokenizers", "staging"):  # elsewhere others may write
            store.sweep_unfinished(folder)
    known_pins = sorted(pinned & set(versions))
    return VacuumResult(store.uri, kept, known_pins, dropped, list(doomed), sum(doomed.values()), dry_run=lease is None)


def _needed_files(store: Store, records: list[VersionRecord]) -> set[str]:
    """What the versions kept are made of, and the newest lease."""
    needed = {f"{LEASES}/{epoch}.json" for epoch in list_epochs(store)[-1:]}
    for record in records:
        needed |= {version_path(record.version), record.row_groups_path, record.tokenizer.path}
    for name in SCHEMAS:
        for delta_version in sorted({getattr(record, name).delta_version for record in records}):
            needed |= {f"{name}/{path}" for path in table_files(open_table(store, name, delta_version))}
    return needed


def _live_refreshes(store: Store, staging_days: float) -> set[str]:
    """Ids of refreshes that have not finished and wrote to their staging in the last ``staging_days``.

    Their data files begin with the id.
    """
    finished = {Dataset(store.uri, version).record.refresh_id for version in list_versions(store)}
    newest: dict[str, float] = {}
    for info in _list_files(store, "staging"):
        name = info.path[len(store.path()) + 1 :].split("/")[1]
        newest[name] = max(newest.get(name, 0.0), info.mtime_ns / 1e9)
    oldest_s = time.time() - staging_days * _DAY_S
    return {name for name, written_s in newest.items() if written_s >= oldest_s and name not in finished}


def _sizes(store: Store, folder: str) -> dict[str, int]:
    """path relative to the dataset -> bytes, of what a vacuum may delete in a folder."""
    start = len(store.path()) + 1
    found = {info.path[start:]: info.size for info in _list_files(store, folder)}
    return {path: size for path, size in sorted(found.items()) if not path.startswith(f"{folder}/_delta_log/")}


def _list_files(store: Store, folder: str) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(store.path(folder), recursive=True, allow_not_found=True)
    return [info for info in store.filesystem.get_file_info(selector) if info.is_file]


def _delete(store: Store, paths: list[str], lease: Lease) -> None:
    with Progress("vacuum", total=len(paths), unit="files") as progress:
        for path in paths:
            if progress.count % 100 == 0:
                lease.check()
            store.delete(path)
            progress.advance()
