"""Row groups of Parquet files with one request each: footers are kept, and a row group is one range of bytes."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from coca.disk_cache import DiskCache
from coca.parquet_bytes import damage_is_told
from coca.s3 import CutShort
from coca.storage import Store

_TAIL_BYTES = 64 * 1024
_END_BYTES = 8  # the footer's length and the magic
# A long run over many files does not keep the footers of all.
_KEPT_FOOTER_BYTES = 256 * 2**20


class ParquetRanges:
    """The files of one dataset. Safe in several threads.

    Args:
        cache: keeps ranges; None reads each from the store.
    """

    def __init__(self, store: Store, cache: DiskCache | None = None) -> None:
        self._store, self._cache = store, cache
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._opening: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def read(self, path: str, row_group: int, columns: Sequence[str]) -> pa.Table:
        """Those ``columns`` that the file has, in its order.

        Raises:
            FileNotFoundError: there is no such file.
            pa.ArrowInvalid: it is no whole Parquet file, or its pages are damaged.
        """
        file = self._file(path)
        with damage_is_told():
            there = [name for name in file.metadata.schema.to_arrow_schema().names if name in columns]
            start, end = _span(file.metadata, row_group, there)
        if not 0 <= start < end <= file.size:
            raise pa.ArrowInvalid(f"its columns lie at bytes {start} to {end} of {file.size}")
        source = _Range(self._read_range(path, file, start, end), start, file.size)
        with damage_is_told():
            parquet = pq.ParquetFile(pa.PythonFile(source, mode="r"), metadata=file.metadata)
            # Threads of Arrow's own would ask a Python file in no order.
            return parquet.read_row_group(row_group, columns=there, use_threads=False)

    def _read_range(self, path: str, file: "_File", start: int, end: int) -> memoryview:
        # The footer is part of the name: another file under the old name is another entry.
        key = f"{self._store.uri}/{path} {file.footer_digest} {start}-{end}"
        data = self._cache.get(key) if self._cache else None
        if data is None or len(data) != end - start:
            data = memoryview(self._store.retry(lambda: self._fetch(path, file, start, end)))
            if self._cache:
                self._cache.put(key, data)
        return data

    def _fetch(self, path: str, file: "_File", start: int, end: int) -> bytes:
        if file.source is not None:
            return _read_at(file.source, start, end)
        with self._store.open(path) as source:
            return _read_at(source, start, end)

    def _file(self, path: str) -> "_File":
        with self._lock:
            opening = self._opening.setdefault(path, threading.Lock())
        with opening:  # row groups of one file that are read at once ask for its footer once
            with self._lock:
                file = self._files.get(path)
                if file is not None:
                    self._files.move_to_end(path)
                    return file
            file = self._store.retry(lambda: _open(self._store, path))
            with self._lock:
                self._keep(path, file)
        return file

    def _keep(self, path: str, file: "_File") -> None:
        self._files[path] = file
        held = sum(each.footer_bytes for each in self._files.values())
        while held > _KEPT_FOOTER_BYTES and len(self._files) > 1:
            gone, dropped = self._files.popitem(last=False)
            self._opening.pop(gone, None)
            held -= dropped.footer_bytes


class _File(NamedTuple):
    source: pa.NativeFile | None
    """On S3, where opening costs a request and a file that is open no descriptor."""
    size: int
    metadata: pq.FileMetaData
    footer_bytes: int
    footer_digest: str


def _open(store: Store, path: str) -> _File:
    source = store.open(path)
    size = source.size()
    tail = _read_at(source, max(0, size - _TAIL_BYTES), size)
    length = int.from_bytes(tail[-_END_BYTES:-4], "little") + _END_BYTES
    if len(tail) < length <= size:
        tail = _read_at(source, size - length, size)
    with damage_is_told():
        metadata = pq.read_metadata(pa.BufferReader(tail))
    digest = hashlib.blake2b(tail[-length:], digest_size=16).hexdigest()
    if not store.is_s3:
        source.close()
    return _File(source if store.is_s3 else None, size, metadata, length, digest)


def _read_at(source: pa.NativeFile, start: int, end: int) -> bytes:
    data: bytes = source.read_at(end - start, start)
    if len(data) != end - start:
        raise CutShort(f"bytes {start}-{end} were read to byte {start + len(data)} only")
    return data


def _span(metadata: pq.FileMetaData, row_group: int, columns: Sequence[str]) -> tuple[int, int]:
    """First byte and the one after the last of the columns' chunks; what lies between is small beside the pictures."""
    group = metadata.row_group(row_group)
    chunks = [group.column(index) for index in range(group.num_columns)]
    wanted = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
    starts = [min(filter(None, (each.dictionary_page_offset, each.data_page_offset))) for each in wanted]
    ends = [start + each.total_compressed_size for start, each in zip(starts, wanted, strict=True)]
    return min(starts), max(ends)


class _Range:
    """A file of which only a range has been read: what Arrow asks for beyond it is an error."""

    def __init__(self, data: memoryview, start: int, size: int) -> None:
        self._data, self._start, self._size, self._place = data, start, size, start
        self.closed = False

    def size(self) -> int:
        return self._size

    def tell(self) -> int:
        return self._place

    def seek(self, place: int, whence: int = 0) -> int:
        self._place = place + (0, self._place, self._size)[whence]
        return self._place

    def read(self, length: int = -1) -> memoryview:
        first = self._place - self._start
        last = first + length if length >= 0 else len(self._data)
        if first < 0 or last > len(self._data):
            raise OSError(f"bytes {self._place} to {self._place + length} are outside of the range")
        self._place += last - first
        return self._data[first:last]

    def close(self) -> None:
        self.closed = True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False
