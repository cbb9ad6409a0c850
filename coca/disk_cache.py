"""A folder on local disk that keeps bytes by key, up to a size, for all processes of a machine; trusted by digest."""

import contextlib
import fcntl
import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coca.errors import BadInput

_DIGEST_BYTES = 32
_ENTRIES, _TOTAL, _TOTAL_DIGITS = "entries", "total", 20
# Room is made for more than the next entry, so that the folder is not looked through for each.
_FULL_AFTER_EVICTION = 0.9


class DiskCache:
    """Entries of bytes, each a file that holds the digest of its key and its bytes, then the bytes.

    What is damaged, cut short or swapped is not there. Several processes may use one folder at once, and any of them
    may be killed at any moment: an entry gets its name when it is whole, and the total is counted under a lock that
    the system takes back from the dead. A count that is off because of one is put right at the next eviction.
    """

    def __init__(self, folder: str | os.PathLike[str], capacity_bytes: int) -> None:
        """
        Raises:
            BadInput: the folder cannot be made or written to.
        """
        self._folder, self._capacity = Path(folder), capacity_bytes
        try:
            (self._folder / _ENTRIES).mkdir(parents=True, exist_ok=True)
            with self._locked_total():
                pass
        except OSError as error:
            raise BadInput(f"the cache folder {folder} cannot be used: {error}", "Give another cache_dir") from None

    def get(self, key: str) -> memoryview | None:
        """The bytes of an entry, None where there is none that is whole."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        digest, payload = data[:_DIGEST_BYTES], memoryview(data)[_DIGEST_BYTES:]
        if digest != _digest(key, payload):
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(FileNotFoundError):  # evicted meanwhile by another process
            os.utime(path)  # the time of an entry says when it was last used
        return payload

    def put(self, key: str, payload: bytes | memoryview) -> None:
        """Keep an entry, unless it is larger than the whole cache or the disk has no room: then nothing happens."""
        size = _DIGEST_BYTES + len(payload)
        if size > self._capacity:
            return
        path = self._path(key)
        staged = path.with_name(f"{uuid.uuid4().hex}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            self._reserve(staged, size)
            with staged.open("r+b") as stream:
                stream.write(_digest(key, payload))
                stream.write(payload)
            os.replace(staged, path)
        except OSError:
            # A full disk, say. Whoever reads goes on from the store.
            staged.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self._folder / _ENTRIES / name[:2] / name

    def _reserve(self, staged: Path, size: int) -> None:
        """Make a file that takes its room at once: whoever counts the files counts it whole, before it is written."""
        with self._locked_total() as total:
            held = total.value
            if held + size > self._capacity:
                held = self._evict(int(self._capacity * _FULL_AFTER_EVICTION) - size)
            total.set(held + size)  # before there is the file: killed between the two, we count too much
            with staged.open("xb") as stream:
                stream.truncate(size)

    def _evict(self, allowed: int) -> int:
        """Leave at most ``allowed`` bytes; how many there are then. What a killed writer left is never used again."""
        entries = sorted(self._entries())
        left = sum(size for _, size, _ in entries)
        for _, size, path in entries:
            if left <= max(allowed, 0):
                break
            path.unlink(missing_ok=True)
            left -= size
        return left

    def _entries(self) -> Iterator[tuple[int, int, Path]]:
        """(time of last use, bytes, path) of every file."""
        for folder in (self._folder / _ENTRIES).iterdir():
            for path in folder.iterdir():
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue  # damaged, and removed by another process
                yield status.st_mtime_ns, status.st_size, path

    @contextmanager
    def _locked_total(self) -> "Iterator[_Total]":
        descriptor = os.open(self._folder / _TOTAL, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            text = os.pread(descriptor, 2 * _TOTAL_DIGITS, 0)
            known = len(text) == _TOTAL_DIGITS and text.isdigit()
            yield _Total(descriptor, int(text) if known else sum(size for _, size, _ in self._entries()))
        finally:
            os.close(descriptor)


@dataclass
class _Total:
    """Bytes of all entries, while the lock on their count is held."""

    descriptor: int
    value: int

    def set(self, value: int) -> None:
        os.pwrite(self.descriptor, b"%0*d" % (_TOTAL_DIGITS, value), 0)


def _digest(key: str, payload: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(key.encode() + b"\0", digest_size=_DIGEST_BYTES)
    digest.update(payload)
    return digest.digest()
