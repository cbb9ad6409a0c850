"""Checking one file of a dataset: every row against the digests and keys that it carries."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coca.contract import ANNOTATIONS, SAMPLES, Reason, State, link_bucket, sample_id
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.withdrawn import Withdrawn
from pipelines.purge import is_zero
from pipelines.tables import file_schema

BUCKETS = 256
_REASONS = {reason.value for reason in Reason}
_STATES = {state.value for state in State}


@dataclass(frozen=True)
class Fault:
    """Something that is not as the contract says."""

    where: str
    """A path in the dataset, with the row group and row where there is one."""
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


@dataclass(frozen=True)
class SamplesFile:
    """A samples file as a Delta log has it."""

    path: str
    size: int
    rows: int
    rows_per_row_group: int


@dataclass
class Checked:
    """What the check of a samples file found."""

    faults: list[Fault] = field(default_factory=list)
    tally: npt.NDArray[np.uint64] = field(default_factory=lambda: empty_tally())
    samples: int = 0
    bytes: int = 0


def empty_tally() -> npt.NDArray[np.uint64]:
    """(buckets, 3): how many ids, and the sum of their two halves modulo 2**64. Equal sets have equal tallies."""
    return np.zeros((BUCKETS, 3), dtype=np.uint64)


def tally_of(ids: list[str]) -> npt.NDArray[np.uint64]:
    """(3,), one row of a tally."""
    try:
        halves = np.frombuffer(bytes.fromhex("".join(ids)), dtype=">u8").reshape(-1, 2)
    except ValueError:  # an id that is none is a fault of its own row
        return np.array([len(ids), 0, 0], dtype=np.uint64)
    return np.array([len(ids), *halves.astype(np.uint64).sum(axis=0, dtype=np.uint64)], dtype=np.uint64)


def check_samples(store: Store, file: SamplesFile, withdrawn: Withdrawn, listed: set[int]) -> Checked:
    """Check a samples file, row group by row group.

    Args:
        listed: row groups of this file in which the withdrawn list has samples.
    """
    checked, path = Checked(), f"samples/{file.path}"
    try:
        size = store.size(path)
        if size != file.size:
            checked.faults.append(Fault(path, f"has {size:,} bytes, the Delta log says {file.size:,}"))
        with store.filesystem.open_input_file(store.path(path)) as source:
            parquet = pq.ParquetFile(source)
            if faults := list(_check_layout(parquet, path, file)):
                checked.faults += faults
                return checked
            for number in range(parquet.metadata.num_row_groups):
                table = parquet.read_row_group(number)
                checked.faults += _check_sample_rows(table, f"{path} row group {number}", withdrawn, number in listed)
                checked.samples += table.num_rows
                checked.bytes += table["image"].nbytes
                _add_to_tally(checked.tally, table)
    except FileNotFoundError:
        checked.faults.append(Fault(path, "is missing"))
    except (OSError, pa.ArrowException) as error:
        checked.faults.append(Fault(path, f"cannot be read: {error}"))
    return checked


def check_annotations(
    store: Store,
    samples_path: str,
    annotations_path: str,
    size: int,
    row_groups: set[tuple[int, int, int]],
    tokenizer: Tokenizer | None,
) -> list[Fault]:
    """Check an annotations file beside its samples file.

    Args:
        size: bytes, as the Delta log says.
        row_groups: (row group, rows, selected) as the index of a version says.
        tokenizer: whose tokens these are; None where it cannot be read.
    """
    path, faults = f"annotations/{annotations_path}", []
    try:
        found = store.size(path)
        if found != size:
            faults.append(Fault(path, f"has {found:,} bytes, the Delta log says {size:,}"))
        with (
            store.filesystem.open_input_file(store.path(f"samples/{samples_path}")) as samples_source,
            store.filesystem.open_input_file(store.path(path)) as source,
        ):
            samples, notes = pq.ParquetFile(samples_source), pq.ParquetFile(source)
            groups = [file.metadata.num_row_groups for file in (samples, notes)]
            if groups[0] != groups[1]:
                return [*faults, Fault(path, f"has {groups[1]} row groups, its samples file {groups[0]}")]
            counts = {number: (rows, selected) for number, rows, selected in row_groups}
            if counts.keys() != set(range(groups[0])) or len(counts) != len(row_groups):
                faults.append(Fault(path, "has other row groups than the index of a version says"))
            for number in range(groups[0]):
                pair = samples.read_row_group(number, columns=["sample_id", "caption"]), notes.read_row_group(number)
                faults += _check_notes(*pair, f"{path} row group {number}", counts.get(number), tokenizer)
    except FileNotFoundError as error:
        faults.append(Fault(path, f"or its samples file is missing: {error}"))
    except (OSError, pa.ArrowException) as error:
        faults.append(Fault(path, f"cannot be read: {error}"))
    return faults


def check_events(store: Store, path: str, size: int, rows: int) -> tuple[list[Fault], list[str]]:
    """Check a file of the ledger; also the ids of the pairs that it says are stored."""
    where, bucket = f"links/{path}", path.partition("/")[0].removeprefix("bucket=")
    try:
        found = store.size(where)
        with store.filesystem.open_input_file(store.path(where)) as source:
            parquet = pq.ParquetFile(source)
            there = [name for name in file_schema("links").names if name in parquet.schema_arrow.names]
            table = parquet.read(columns=there)
    except FileNotFoundError:
        return [Fault(where, "is missing")], []
    except (OSError, pa.ArrowException) as error:
        return [Fault(where, f"cannot be read: {error}")], []
    faults = []
    if (found, table.num_rows) != (size, rows):
        faults.append(
            Fault(where, f"has {found:,} bytes and {table.num_rows:,} rows, the Delta log says {size:,} and {rows:,}")
        )
    stored = []
    for number, row in enumerate(table.to_pylist()):
        faults += [Fault(f"{where} row {number}", problem) for problem in _event_problems(row, bucket)]
        said = row.get("stored")
        if said or (said is None and row["state"] == State.OK):
            stored.append(row["sample_id"])
    return faults, stored


def _check_layout(parquet: pq.ParquetFile, path: str, file: SamplesFile) -> Iterator[Fault]:
    there = parquet.schema_arrow
    for column in SAMPLES:
        if column.name not in there.names and not column.nullable:
            yield Fault(path, f"has no column {column.name}")
        elif column.name in there.names and there.field(column.name).type != column.type:
            yield Fault(path, f"column {column.name} is {there.field(column.name).type}, not {column.type}")
    if parquet.metadata.num_rows != file.rows:
        yield Fault(path, f"has {parquet.metadata.num_rows:,} rows, the Delta log says {file.rows:,}")
    sizes = [parquet.metadata.row_group(number).num_rows for number in range(parquet.metadata.num_row_groups)]
    if any(size != file.rows_per_row_group for size in sizes[:-1]) or sizes[-1:] > [file.rows_per_row_group]:
        yield Fault(path, f"has row groups of {sizes} rows, the version says {file.rows_per_row_group}")


def _check_sample_rows(table: pa.Table, where: str, withdrawn: Withdrawn, is_listed: bool) -> Iterator[Fault]:
    hidden = withdrawn.mask(table["sample_id"])
    if hidden.any() and not is_listed:
        yield Fault(where, "has withdrawn samples that the list does not have here; `coca data purge` adds them")
    copies = pc.is_in(table["source_sha256"], value_set=withdrawn.source_sha256).to_numpy() & ~hidden
    for number, (row, is_hidden, is_copy) in enumerate(zip(_rows(table), hidden, copies, strict=True)):
        here = f"{where} row {number}"
        purged = is_hidden and is_zero(row["image"])
        if not purged and hashlib.sha256(row["image"]).hexdigest() != row["sha256"]:
            yield Fault(here, f"the image does not match its sha256 {row['sha256']}")
        if sample_id(row["url"], row["caption"]) != row["sample_id"]:
            yield Fault(here, f"{row['sample_id']} is not the key of its url and caption")
        if is_copy:
            yield Fault(here, f"{row['sample_id']} is a copy of a withdrawn picture; `coca data purge` withdraws it")


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.select(["sample_id", "url", "caption", "image", "sha256"]).to_pylist()
    return rows


def _add_to_tally(tally: npt.NDArray[np.uint64], table: pa.Table) -> None:
    ids: dict[int, list[str]] = {}
    for key, url in zip(table["sample_id"].to_pylist(), table["url"].to_pylist(), strict=True):
        ids.setdefault(int(link_bucket(url), 16), []).append(key)
    for bucket, keys in ids.items():
        tally[bucket] += tally_of(keys)


def _check_notes(
    samples: pa.Table, notes: pa.Table, where: str, counts: tuple[int, int] | None, tokenizer: Tokenizer | None
) -> Iterator[Fault]:
    for column in ANNOTATIONS:
        if column.name not in notes.column_names and not column.nullable:
            yield Fault(where, f"has no column {column.name}")
            return
    if not samples["sample_id"].equals(notes["sample_id"]):
        yield Fault(where, "has other rows than its samples file, or another order")
        return
    found = notes.num_rows, pc.sum(notes["selected"]).as_py() or 0
    if counts is not None and counts != found:
        yield Fault(where, f"has {found[0]} rows, {found[1]} selected; the index says {counts[0]} and {counts[1]}")
    tokens = tokenizer.encode(samples["caption"].to_pylist()) if tokenizer and notes.num_rows else None
    for number, row in enumerate(notes.to_pylist()):
        if row["selected"] and row["reason"] is not None:
            yield Fault(f"{where} row {number}", f"is selected with the reason {row['reason']} against it")
        elif not row["selected"] and row["reason"] not in _REASONS:
            yield Fault(f"{where} row {number}", f"is not selected for the reason {row['reason']}, which is none")
        if tokens is not None and row["tokens"] != tokens[number]:
            yield Fault(f"{where} row {number}", "its tokens are not what the tokenizer makes of the caption")


def _event_problems(row: dict[str, object], bucket: str) -> Iterator[str]:
    url, caption = str(row["url"]), str(row["caption"])
    if link_bucket(url) != bucket:
        yield f"{url} belongs to the bucket {link_bucket(url)}"
    if sample_id(url, caption) != row["sample_id"]:
        yield f"{row['sample_id']} is not the key of its url and caption"
    if row["state"] not in _STATES:
        yield f"the state {row['state']} is none"
    if row["reason"] is not None and row["reason"] not in _REASONS:
        yield f"the reason {row['reason']} is none"
