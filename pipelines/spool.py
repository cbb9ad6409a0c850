"""Images of an unfinished part on local disk: a part that waits for its last slow hosts holds no memory."""

import os
import tempfile
from typing import NamedTuple, Self


class Spooled(NamedTuple):
    """Where bytes lie in a spool."""

    offset: int
    size: int


class Spool:
    """A file without a name, gone with its process. One writer; readers from any thread."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="coca-spool-")  # noqa: SIM115 - closed by __exit__
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, data: bytes) -> Spooled:
        written = 0
        while written < len(data):
            written += os.pwrite(self._file.fileno(), data[written:], self._end + written)
        place = Spooled(self._end, len(data))
        self._end += len(data)
        return place

    def read(self, place: Spooled) -> bytes:
        return os.pread(self._file.fileno(), place.size, place.offset)
