"""Verifying a dataset: every version, every file, every digest; files that several versions share are read once."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake.exceptions import DeltaError

from coca.contract import VersionRecord, link_bucket
from coca.dataset import Dataset, list_versions
from coca.errors import BadInput
from coca.progress import Progress
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.withdrawn import Withdrawn, list_withdrawn, read_withdrawn
from pipelines.tables import SCHEMAS, file_sizes, open_table
from pipelines.verify_files import (
    Checked,
    Fault,
    SamplesFile,
    check_annotations,
    check_events,
    check_samples,
    empty_tally,
    tally_of,
)

Report = Callable[[Fault], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class VerifyResult:
    """What was looked at, and how much of it is not as the contract says."""

    dataset: str
    versions: list[int]
    files: int
    samples: int
    """Stored samples read, of all versions together."""
    bytes: int
    """Of images."""
    withdrawn: int
    faults: int


@dataclass
class _Version:
    """A version that can be opened: what it is made of, and what its samples add up to."""

    record: VersionRecord
    tokenizer: Tokenizer | None
    files: dict[str, dict[str, tuple[int, int]]]
    """table -> path -> (bytes, rows), of the Delta log."""
    groups: dict[tuple[str, str], set[tuple[int, int, int]]]
    """(samples file, annotations file) -> (row group, rows, selected), of the index."""
    tally: npt.NDArray[np.uint64] = field(default_factory=empty_tally)


def verify(uri: str, version: int | None = None, *, report: Report) -> VerifyResult:
    """Check one version, or all; memory holds a few row groups and one bucket of the ledger.

    Args:
        report: called with every fault as it is found.

    Raises:
        BadInput: no dataset, no such version, or a withdrawn list that cannot be read.
    """
    store = Dataset(uri, version).store if version is not None else Store(uri)
    wanted = list_versions(store) if version is None else [version]
    if not wanted:
        Dataset(uri)  # says what is missing
    return _Verification(store, report).run(wanted)


class _Verification:
    def __init__(self, store: Store, report: Report) -> None:
        self._store, self._report = store, report
        self._withdrawn: Withdrawn = read_withdrawn(store)
        self._digests = _digests_so_far(store)
        self._faults = self._files = self._samples = self._bytes = 0

    def run(self, numbers: list[int]) -> VerifyResult:
        versions = [opened for number in numbers if (opened := self._open(number)) is not None]
        self._check_samples(versions)
        self._check_annotations(versions)
        self._check_ledger(versions)
        return VerifyResult(
            dataset=self._store.uri,
            versions=numbers,
            files=self._files,
            samples=self._samples,
            bytes=self._bytes,
            withdrawn=len(self._withdrawn),
            faults=self._faults,
        )

    def _fault(self, *faults: Fault) -> None:
        for fault in faults:
            self._faults += 1
            self._report(fault)

    def _open(self, number: int) -> _Version | None:
        """A version's record, index and Delta snapshots, checked against one another."""
        where = f"version {number}"
        try:
            dataset = Dataset(self._store.uri, number)
            index = dataset.recorded_row_groups
        except BadInput as error:
            self._fault(Fault(where, error.cause))
            return None
        tokenizer = None
        try:
            tokenizer = dataset.tokenizer
        except BadInput as error:
            self._fault(Fault(where, error.cause))
        files: dict[str, dict[str, tuple[int, int]]] = {}
        for name in SCHEMAS:
            try:
                files[name] = file_sizes(open_table(self._store, name, getattr(dataset.record, name).delta_version))
            except DeltaError as error:
                self._fault(Fault(where, f"the Delta version of {name} cannot be opened: {error}"))
                return None
        groups: dict[tuple[str, str], set[tuple[int, int, int]]] = defaultdict(set)
        for row in index.to_pylist():
            pair = row["samples_path"], row["annotations_path"]
            groups[pair].add((row["row_group"], row["rows"], row["selected"]))
        opened = _Version(dataset.record, tokenizer, files, groups)
        self._fault(*(Fault(where, problem) for problem in _record_problems(opened, number, self._digests)))
        return opened

    def _check_samples(self, versions: list[_Version]) -> None:
        users: dict[SamplesFile, list[_Version]] = defaultdict(list)
        for version in versions:
            for path, (size, rows) in version.files["samples"].items():
                users[SamplesFile(path, size, rows, version.record.rows_per_row_group)].append(version)
        listed: dict[str, set[int]] = defaultdict(set)
        for row in self._withdrawn.table.select(["samples_path", "row_group"]).to_pylist():
            listed[row["samples_path"]].add(row["row_group"])

        def check(file: SamplesFile) -> Checked:
            return check_samples(self._store, file, self._withdrawn, listed.get(file.path, set()))

        files = sorted(users, key=lambda file: file.path)
        for file, checked in zip(files, self._each(check, files, "samples"), strict=True):
            self._fault(*checked.faults)
            self._samples += checked.samples
            self._bytes += checked.bytes
            for version in users[file]:
                version.tally += checked.tally

    def _check_annotations(self, versions: list[_Version]) -> None:
        users: dict[tuple[str, str], list[_Version]] = defaultdict(list)
        for version in versions:
            for pair in version.groups:
                users[pair].append(version)

        def check(pair: tuple[str, str]) -> list[Fault]:
            faults: dict[Fault, None] = {}
            seen = set()
            for version in users[pair]:
                size = version.files["annotations"].get(pair[1], (0, 0))[0]
                key = frozenset(version.groups[pair]), version.record.tokenizer.fingerprint, size
                if key not in seen:
                    seen.add(key)
                    found = check_annotations(self._store, *pair, size, version.groups[pair], version.tokenizer)
                    faults |= dict.fromkeys(found)
            return list(faults)

        for faults in self._each(check, sorted(users), "annotations"):
            self._fault(*faults)

    def _check_ledger(self, versions: list[_Version]) -> None:
        """Every stored sample has an event that says so, and every such event its sample, bucket by bucket."""
        buckets: dict[str, dict[str, tuple[int, int]]] = defaultdict(dict)
        for version in versions:
            for path, bytes_rows in version.files["links"].items():
                buckets[path.partition("/")[0].removeprefix("bucket=")][path] = bytes_rows
        with Progress("links", total=256, unit="buckets") as progress:
            for number in range(256):
                bucket = f"{number:02x}"
                files = buckets.get(bucket, {})
                stored: dict[str, list[str]] = {}
                for path, (size, rows) in sorted(files.items()):
                    faults, stored[path] = check_events(self._store, path, size, rows)
                    self._fault(*faults)
                    self._files += 1
                for version in versions:
                    self._compare_bucket(
                        version, bucket, (stored[path] for path in files if path in version.files["links"])
                    )
                progress.advance()
        for name in buckets.keys() - {f"{number:02x}" for number in range(256)}:
            self._fault(Fault(f"links/bucket={name}", "is no bucket of the ledger"))

    def _compare_bucket(self, version: _Version, bucket: str, stored: Iterable[list[str]]) -> None:
        said = sorted({key for keys in stored for key in keys})
        if np.array_equal(tally_of(said), version.tally[int(bucket, 16)]):
            return
        where, found = f"version {version.record.version}", list(self._samples_of(version, bucket))
        for key in sorted(set(found) - set(said)):
            self._fault(Fault(where, f"sample {key} is stored, and no event of links/bucket={bucket} says so"))
        for key in sorted(set(said) - set(found)):
            self._fault(Fault(where, f"links/bucket={bucket} says that {key} is stored, and no samples file has it"))
        for key in sorted({key for key in found if found.count(key) > 1}):
            self._fault(Fault(where, f"sample {key} is stored {found.count(key)} times"))

    def _samples_of(self, version: _Version, bucket: str) -> Iterator[str]:
        for path in sorted(version.files["samples"]):
            try:
                with self._store.filesystem.open_input_file(self._store.path(f"samples/{path}")) as source:
                    rows = pq.ParquetFile(source).read(columns=["sample_id", "url"])
            except (OSError, ValueError):
                continue  # reported where the file was checked
            for key, url in zip(rows["sample_id"].to_pylist(), rows["url"].to_pylist(), strict=True):
                if link_bucket(url) == bucket:
                    yield key

    def _each(self, check: Callable[[Item], Result], items: list[Item], title: str) -> Iterator[Result]:
        """Results in order, a few files at a time."""
        with (
            Progress(title, total=len(items), unit="files") as progress,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ):
            for result in pool.map(check, items):
                self._files += 1
                yield result
                progress.advance(note=f"{self._faults:,} faults" if self._faults else "")


def _record_problems(version: _Version, number: int, digests: set[str]) -> Iterator[str]:
    record, files = version.record, version.files
    if record.version != number:
        yield f"the record says that it is version {record.version}"
    if record.parent is not None and not 0 < record.parent < number:
        yield f"its parent {record.parent} is no earlier version"
    if record.withdrawn_sha256 not in digests:
        yield "the withdrawn list has never been what the record says: an entry has been lost or changed"
    for name, there in files.items():
        said, rows = getattr(record, name), sum(rows for _, rows in there.values())
        if (said.files, said.rows) != (len(there), rows):
            yield (
                f"{name} has {len(there):,} files and {rows:,} rows, the record says {said.files:,} and {said.rows:,}"
            )
    for place, name in enumerate(("samples", "annotations")):
        indexed, logged = {pair[place] for pair in version.groups}, files[name].keys()
        yield from (f"{name}/{path} is in the Delta table and not in the index" for path in sorted(logged - indexed))
        yield from (f"{name}/{path} is in the index and not in the Delta table" for path in sorted(indexed - logged))
    if len({samples for samples, _ in version.groups}) != len(version.groups):
        yield "a samples file has two annotations files in the index"
    selected = sum(selected for groups in version.groups.values() for _, _, selected in groups)
    if selected != record.selected:
        yield f"{selected:,} samples of the index are selected, the record says {record.selected:,}"


def _digests_so_far(store: Store) -> set[str]:
    """What the digest of the withdrawn list has been, from the first of its files to the last."""
    names = list_withdrawn(store)
    written = {name: str(pc.max(read_withdrawn(store, (name,)).table["withdrawn_at"])) for name in names}
    ordered = sorted(names, key=lambda name: (written[name], name))
    digests = {hashlib.sha256(b"").hexdigest()}
    for count in range(1, len(ordered) + 1):
        digests.add(read_withdrawn(store, tuple(ordered[:count])).digest)
    return digests
