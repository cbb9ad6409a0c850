"""Purging: the bytes of withdrawn pictures become zeros where they lie.

Why in place: docs/decisions/0023-purge-zeroes-in-place.md.
"""

import hashlib
import os
from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from coca.dataset import Dataset
from coca.errors import RunFailed
from coca.progress import Progress
from coca.storage import Store
from coca.withdrawn import Withdrawn, append_withdrawn, read_withdrawn
from pipelines.lease import hold_lease
from pipelines.tables import lying_files
from pipelines.withdraw import find_stored, unique_name, unlisted


@dataclass(frozen=True)
class PurgeResult:
    """What a purge overwrote."""

    dataset: str
    files: int
    """Samples files in which bytes were overwritten."""
    samples: int
    bytes: int
    purged_before: int
    """Withdrawn samples whose bytes were zeros already."""


class Span(NamedTuple):
    """Bytes of a file."""

    start: int
    length: int


def purge(uri: str) -> PurgeResult:
    """Overwrite the picture of every withdrawn sample, in every file that has it, with zeros.

    Sizes, footers, Delta logs and versions stay as they are; the row remains, without its picture. Killed, the same
    call goes on; each file is read back when it is done. Copies that the list does not have yet are added to it first.

    Raises:
        BadInput: no dataset, or it is being written.
        RunFailed: a file cannot be read, or lays its images out in another way than a refresh does.
    """
    store = Dataset(uri).store
    with hold_lease(store, "coca data purge") as lease:
        listed = read_withdrawn(store)
        found = find_stored(
            store,
            urls=listed.urls,
            source_sha256=listed.source_sha256,
            sample_ids=listed.sample_ids,
            reason="copy_of_withdrawn",
        )
        lease.check()
        append_withdrawn(store, unlisted(found, listed), unique_name("purge"))
        withdrawn = read_withdrawn(store)
        there = lying_files(store, "samples")
        groups: dict[str, set[int]] = defaultdict(set)
        for row in withdrawn.table.select(["samples_path", "row_group"]).to_pylist():
            if row["samples_path"] in there:
                groups[row["samples_path"]].add(row["row_group"])
        files = samples = size = before = 0
        with Progress("purge", total=len(groups), unit="files") as progress:
            for path, row_groups in sorted(groups.items()):
                spans, zeros = _spans(store, path, sorted(row_groups), withdrawn)
                if spans:
                    lease.check()
                    _zero(store, f"samples/{path}", spans)
                    _check_purged(store, path, sorted(row_groups), withdrawn)
                files += bool(spans)
                samples += len(spans)
                size += sum(span.length for span in spans)
                before += zeros
                progress.advance(note=f"{samples:,} samples")
        return PurgeResult(store.uri, files, samples, size, before)


def is_zero(image: bytes) -> bool:
    """Whether a stored picture has been purged."""
    return image.count(0) == len(image)


def _spans(store: Store, path: str, row_groups: list[int], withdrawn: Withdrawn) -> tuple[list[Span], int]:
    """Where the pictures of withdrawn rows lie in a samples file, and how many of them are zeros already."""
    spans, zeros = [], 0
    with store.filesystem.open_input_file(store.path(f"samples/{path}")) as source:
        file = pq.ParquetFile(source)
        for number in row_groups:
            start, raw = _image_chunk(store, path, source, file, number)
            rows = file.read_row_group(number, columns=["sample_id", "image"])
            hidden = withdrawn.mask(rows["sample_id"])
            cursor = 0
            for image, is_hidden in zip(rows["image"].to_pylist(), hidden, strict=True):
                # PLAIN: a length of four bytes, then the bytes; between two values lies at most a page header.
                place = raw.find(len(image).to_bytes(4, "little") + image, cursor)
                if place < 0:
                    raise RunFailed(
                        f"{store.uri}/samples/{path}: an image is not where its column lies; see `coca data verify`"
                    )
                cursor = place + 4 + len(image)
                if is_hidden and is_zero(image):
                    zeros += 1
                elif is_hidden:
                    spans.append(Span(start + place + 4, len(image)))
    return spans, zeros


def _image_chunk(
    store: Store, path: str, source: pa.NativeFile, file: pq.ParquetFile, row_group: int
) -> tuple[int, bytes]:
    """Offset and bytes of the image column of a row group, which are its pictures one after the other."""
    group = file.metadata.row_group(row_group)
    column = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == "image")
    if column.compression != "UNCOMPRESSED" or column.has_dictionary_page:
        raise RunFailed(
            f"{store.uri}/samples/{path} keeps its images compressed ({column.compression}) or by a dictionary: "
            "they cannot be overwritten in place. Export the dataset and import it again, "
            "which leaves withdrawn samples out, then delete this one"
        )
    source.seek(column.data_page_offset)
    return column.data_page_offset, source.read(column.total_compressed_size)


def _zero(store: Store, path: str, spans: list[Span]) -> None:
    if not store.is_s3:
        # In the file itself, not in a copy that takes its name: a copy would leave the bytes on the disk.
        with open(store.path(path), "r+b") as stream:
            for span in spans:
                stream.seek(span.start)
                stream.write(bytes(span.length))
            stream.flush()
            os.fsync(stream.fileno())
        return
    data = bytearray(store.read(path))
    for span in spans:
        data[span.start : span.start + span.length] = bytes(span.length)
    store.write(path, bytes(data))


def _check_purged(store: Store, path: str, row_groups: list[int], withdrawn: Withdrawn) -> None:
    """Read back what was written: withdrawn pictures are zeros, all others still match their digests."""
    with store.filesystem.open_input_file(store.path(f"samples/{path}")) as source:
        file = pq.ParquetFile(source)
        for number in row_groups:
            rows = file.read_row_group(number, columns=["sample_id", "image", "sha256"])
            hidden = withdrawn.mask(rows["sample_id"])
            for row, is_hidden in zip(rows.to_pylist(), hidden, strict=True):
                if is_hidden and not is_zero(row["image"]):
                    raise RunFailed(
                        f"{store.uri}/samples/{path} still holds the picture of {row['sample_id']} after its purge"
                    )
                if not is_hidden and hashlib.sha256(row["image"]).hexdigest() != row["sha256"]:
                    raise RunFailed(f"{store.uri}/samples/{path}: the picture of {row['sample_id']} has been damaged")
