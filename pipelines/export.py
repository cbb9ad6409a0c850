"""A version of a dataset as files for others: webdataset shards that open_clip trains from, or plain Parquet.

A shard is a pure function of the version and its number: the same bytes at every run. A finished one is not written
again, and nobody sees a part of one.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from coca.contract import SAMPLES
from coca.dataset import Dataset
from coca.errors import BadInput
from coca.progress import Progress
from coca.storage import Store
from pipelines.export_formats import write_parquet, write_tar
from pipelines.rows import read_annotations

ExportFormat = Literal["webdataset", "parquet"]

RECORD = "_export/export.json"
_NOTES = ("sample_id", "language", "scores")
_READ_THREADS = 16
_WRITERS: dict[str, tuple[str, Callable[[Iterator[pa.Table], Path], None]]] = {
    "webdataset": ("tar", write_tar),
    "parquet": ("parquet", write_parquet),
}


@dataclass(frozen=True)
class ExportResult:
    """What lies there after an export."""

    dataset: str
    version: int
    to: str
    format: str
    samples: int
    shards: int
    bytes: int
    """Of all shards."""
    written: int
    """Shards that this call wrote; the others were there."""


@dataclass(frozen=True)
class Stretch:
    """Rows ``start`` to ``stop`` of what ``Dataset.read_row_group(row_group)`` gives."""

    row_group: int
    start: int
    stop: int


def plan_shards(selected: list[int], samples_per_shard: int) -> list[list[Stretch]]:
    """The stretches of each shard, from the selected rows of each row group; only the last shard is not full."""
    shards: list[list[Stretch]] = []
    room = 0
    for group, count in enumerate(selected):
        start = 0
        while start < count:
            if not room:
                shards.append([])
                room = samples_per_shard
            stop = min(count, start + room)
            shards[-1].append(Stretch(group, start, stop))
            room -= stop - start
            start = stop
    return shards


def export_dataset(
    uri: str, to: str, form: ExportFormat, *, version: int | None = None, samples_per_shard: int = 10_000
) -> ExportResult:
    """Write the selected samples of a version, in stored order and without what has been withdrawn, as shards
    ``00000``, ``00001``, ...

    The folder ``_export`` beside them says what was exported and which shards are finished. ``sizes.json`` tells
    open_clip how many samples each tar holds (its ``get_dataset_size``, open_clip_train/data.py).

    Raises:
        BadInput: no such dataset or version, nothing selected in it, or ``to`` holds something else.
    """
    dataset, target = Dataset(uri, version), Store(to)
    target.check_folder("--to")
    shards = plan_shards(dataset.row_groups["selected"].to_pylist(), samples_per_shard)
    if not shards:
        raise BadInput(
            f"version {dataset.record.version} of {dataset.store.uri} has no selected sample", "Export another version"
        )
    _claim(target, dataset, form, samples_per_shard)
    suffix, write = _WRITERS[form]
    names = [f"{number:05d}.{suffix}" for number in range(len(shards))]
    sizes = [sum(piece.stop - piece.start for piece in shard) for shard in shards]
    identities = [_identity(dataset, shard) for shard in shards]
    finished = _finished(target, names, identities)
    _drop_surplus(target, names)
    started = sum(size for name, size in zip(names, sizes, strict=True) if name in finished)
    kept, reader = len(finished), _Reader(dataset)
    with Progress("export", total=sum(sizes), unit="samples", start=started) as progress:
        for name, size, identity, shard in zip(names, sizes, identities, shards, strict=True):
            if name not in finished:
                finished[name] = _write_shard(target, name, reader.read(shard), write)
                _write_json(target, _done_path(name), {"identity": identity, "bytes": finished[name], "samples": size})
                progress.advance(size)
    if form == "webdataset":
        _write_json(target, "sizes.json", dict(zip(names, sizes, strict=True)))
    return ExportResult(
        dataset=dataset.store.uri,
        version=dataset.record.version,
        to=target.uri,
        format=form,
        samples=sum(sizes),
        shards=len(shards),
        bytes=sum(finished.values()),
        written=len(shards) - kept,
    )


class _Reader:
    """Rows with all that is exported of them; keeps the last row group, which two shards may share."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset, self._last = dataset, (-1, pa.table({}))

    def read(self, shard: list[Stretch]) -> Iterator[pa.Table]:
        for piece in shard:
            if self._last[0] != piece.row_group:
                self._last = piece.row_group, self._read_group(piece.row_group)
            yield self._last[1].slice(piece.start, piece.stop - piece.start)

    def _read_group(self, index: int) -> pa.Table:
        rows = self._dataset.read_row_group(index, columns=tuple(SAMPLES.names))
        notes = read_annotations(self._dataset, index, list(_NOTES))
        places = pc.index_in(rows["sample_id"], value_set=notes["sample_id"].combine_chunks())
        for name in _NOTES[1:]:
            rows = rows.append_column(name, notes[name].take(places))
        return rows


def _claim(target: Store, dataset: Dataset, form: str, samples_per_shard: int) -> None:
    """Say what the folder is for, or check that it is for the same."""
    claim = {
        "dataset": dataset.store.uri,
        "version": dataset.record.version,
        "format": form,
        "samples_per_shard": samples_per_shard,
        "row_groups_sha256": dataset.record.row_groups_sha256,
    }
    if not target.exists(RECORD):
        if target.list():
            raise BadInput(f"--to {target.uri} holds other files", "Give a folder that is empty or not there yet")
        _write_json(target, RECORD, claim)
        return
    found = _read_json(target, RECORD)
    if {**found, "dataset": None} != {**claim, "dataset": None}:
        raise BadInput(
            f"--to {target.uri} holds an export of {found.get('dataset')} version {found.get('version')} as "
            f"{found.get('format')}, {found.get('samples_per_shard')} samples a shard",
            "Give another folder",
        )


def _identity(dataset: Dataset, shard: list[Stretch]) -> str:
    """Which rows a shard holds. Withdrawals only grow, so the count of a row group tells which of its rows are left."""
    groups = dataset.row_groups
    rows = [(groups.slice(piece.row_group, 1).to_pylist(), piece.start, piece.stop) for piece in shard]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def _finished(target: Store, names: list[str], identities: list[str]) -> dict[str, int]:
    """The shards that are there with the rows they should have -> their bytes."""
    done = set(target.list("_export"))
    there = {info.base_name: info.size for info in target.filesystem.get_file_info(pafs.FileSelector(target.path()))}
    candidates = [
        (name, identity)
        for name, identity in zip(names, identities, strict=True)
        if _done_path(name).rpartition("/")[2] in done and name in there
    ]

    def holds(candidate: tuple[str, str]) -> bool:
        name, identity = candidate
        found = _read_json(target, _done_path(name))
        return (found.get("identity"), found.get("bytes")) == (identity, there[name])

    with ThreadPoolExecutor(_READ_THREADS) as threads:
        held = list(threads.map(holds, candidates))
    return {name: there[name] for (name, _), good in zip(candidates, held, strict=True) if good}


def _drop_surplus(target: Store, names: list[str]) -> None:
    """Shards at the end that are no more, since rows have been withdrawn."""
    shards, suffix = set(names), names[0].rpartition(".")[2]
    for name in target.list():
        if name.endswith(f".{suffix}") and name not in shards:
            target.delete(name)
    wanted = {RECORD, *(_done_path(name) for name in names)}
    for name in target.list("_export"):
        if f"_export/{name}" not in wanted:
            target.delete(f"_export/{name}")


def _write_shard(
    target: Store, name: str, tables: Iterator[pa.Table], write: Callable[[Iterator[pa.Table], Path], None]
) -> int:
    """Write a shard as a whole: on disk by renaming, on S3 by one upload. Returns its bytes."""
    if not target.is_s3:
        staged = Path(target.path(f".{name}.tmp"))
        try:
            write(tables, staged)
            size = staged.stat().st_size
            with staged.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(staged, target.path(name))
        finally:
            staged.unlink(missing_ok=True)
        return size
    with tempfile.TemporaryDirectory(prefix="coca-export-") as folder:
        staged = Path(folder) / name
        write(tables, staged)
        # Runs below Python: an interrupt comes after it, and does not complete half an upload.
        pafs.copy_files(
            str(staged),
            target.path(name),
            source_filesystem=pafs.LocalFileSystem(),
            destination_filesystem=target.filesystem,
        )
        return staged.stat().st_size


def _done_path(name: str) -> str:
    return f"_export/{name.rpartition('.')[0]}.json"


def _write_json(target: Store, path: str, value: dict[str, Any]) -> None:
    target.write(path, json.dumps(value, sort_keys=True, indent=1).encode())


def _read_json(target: Store, path: str) -> dict[str, Any]:
    try:
        value = json.loads(target.read(path))
    except (ValueError, OSError):
        return {}
    return value if isinstance(value, dict) else {}
