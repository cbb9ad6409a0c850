"""Reading a tar that a stranger wrote, as a stream: nothing touches the disk, and no size is believed."""

import io
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from coca.errors import BadInput

_BLOCK = tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 20
_MAX_NAME_BYTES = 1 << 16
_WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


@dataclass(frozen=True)
class TarMember:
    """A plain file of a tar; ``data`` is None where it is larger than its cap."""

    name: str
    data: bytes | None


def read_members(source: io.BufferedIOBase, cap: Callable[[str], int], shown: str) -> Iterator[TarMember]:
    """The plain files whose ``cap(name)`` in bytes is above 0, in their order. Links, devices, folders and sparse
    files are passed over, names are only names.

    tarfile's own stream mode reads extended headers of any size into memory and takes a tar without its end for whole.

    Raises:
        BadInput: a damaged header, or the end comes too early; what was read before has been handed out.
    """
    reader = _Reader(source, shown)
    renamed: str | None = None
    resized: int | None = None
    sparse = False
    while (block := reader.read(_BLOCK)) != bytes(_BLOCK):
        header = reader.parse(block)
        if header.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE):
            records = _pax_records(reader.read_small(header.size))
            if header.type != tarfile.XGLTYPE:
                renamed = records.get("path", renamed)
                resized = int(records["size"]) if records.get("size", "").isdecimal() else resized
                sparse = sparse or any(key.startswith("GNU.sparse.") for key in records)
            continue
        if header.type == tarfile.GNUTYPE_LONGNAME:
            renamed = reader.read_small(header.size).rstrip(b"\0").decode(errors="replace")
            continue
        size = 0 if header.type in _WITHOUT_DATA else header.size if resized is None else resized
        plain = header.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not sparse
        if header.type == tarfile.GNUTYPE_SPARSE:
            reader.skip_sparse_map(block)
        name = header.name if renamed is None else renamed
        renamed, resized, sparse = None, None, False
        most = cap(name) if plain else 0
        if not most:
            reader.skip(size)
        elif size > most:
            reader.skip(size)
            yield TarMember(name, None)
        else:
            yield TarMember(name, reader.read_padded(size))


class _Reader:
    def __init__(self, source: io.BufferedIOBase, shown: str) -> None:
        self._source, self._shown, self._place = source, shown, 0

    def read(self, size: int) -> bytes:
        data = self._source.read(size)
        self._place += len(data)
        if len(data) < size:
            raise self._damaged("ends early")
        return data

    def read_padded(self, size: int) -> bytes:
        data = self.read(size)
        self.read(-size % _BLOCK)
        return data

    def read_small(self, size: int) -> bytes:
        if not 0 <= size <= _MAX_NAME_BYTES:
            raise self._damaged(f"has an extended header of {size:,} bytes")
        return self.read_padded(size)

    def skip(self, size: int) -> None:
        left = size + -size % _BLOCK
        while left:
            left -= len(self.read(min(left, _CHUNK_BYTES)))

    def skip_sparse_map(self, block: bytes) -> None:
        more = block[482]
        while more:
            more = self.read(_BLOCK)[504]

    def parse(self, block: bytes) -> tarfile.TarInfo:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise self._damaged(f"holds no tar header ({error})") from None
        if header.size < 0:
            raise self._damaged(f"has a member of {header.size:,} bytes")
        return header

    def _damaged(self, problem: str) -> BadInput:
        return BadInput(
            f"{self._shown} {problem} at byte {self._place:,}", "The shard is damaged: make it anew, or take it away"
        )


def _pax_records(data: bytes) -> dict[str, str]:
    """``LENGTH KEY=VALUE\\n`` again and again (POSIX.1-2001); what follows a damaged record is dropped."""
    records: dict[str, str] = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or len(length) > 9 or not 0 < int(length) <= len(data):
            break
        record, data = data[: int(length)], data[int(length) :]
        key, _, value = record[len(length) + 1 : -1].partition(b"=")
        records[key.decode(errors="replace")] = value.decode(errors="replace")
    return records
