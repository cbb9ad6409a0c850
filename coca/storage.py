"""One URI, one set of credentials, every client: pyarrow, deltalake and conditional writes on a local path or S3.

Credentials come from the usual AWS variables; ``AWS_ENDPOINT_URL`` points all clients at another S3 service.
"""

import contextlib
import os
import re
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from coca.errors import BadInput
from coca.s3 import CutShort, delta_options, retry
from coca.s3_folder import S3Folder

Result = TypeVar("Result")

_SCHEME = re.compile(r"^([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
# As ``_stage`` names them.
_STAGED = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


class Store:
    """A folder on local disk or S3. Paths given to methods are relative to it, with forward slashes.

    Holds only the uri, so that it travels to Ray workers; clients are made where they are used.
    """

    def __init__(self, uri: str | os.PathLike[str]) -> None:
        text = os.fspath(uri)
        scheme = _SCHEME.match(text)
        if scheme is None or scheme[1].lower() == "file":
            path = text[len(scheme[0]) :] if scheme else text
            self.uri, self.is_s3 = str(Path(path).expanduser().absolute()), False
            self.root = self.uri
        elif scheme[1].lower() == "s3":
            self.root = text[len(scheme[0]) :].rstrip("/")
            self.uri, self.is_s3 = f"s3://{self.root}", True
            if not self.root.split("/")[0]:
                raise BadInput(f"{text!r} names no bucket", "Write s3://BUCKET/PREFIX")
        else:
            raise BadInput(
                f"{text!r}: storage scheme {scheme[1]!r} is not supported", "Use a path or s3://BUCKET/PREFIX"
            )

    def __reduce__(self) -> tuple[type["Store"], tuple[str]]:
        return type(self), (self.uri,)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def child(self, path: str) -> "Store":
        """The folder ``path`` as a store of its own."""
        return Store(f"{self.uri}/{path}")

    @cached_property
    def filesystem(self) -> pafs.FileSystem:
        return self._s3.filesystem if self.is_s3 else pafs.LocalFileSystem()

    @cached_property
    def _s3(self) -> S3Folder:
        return S3Folder(self.root)

    def check_folder(self, option: str) -> None:
        """Raises BadInput, naming the ``option`` that gave it, where a file lies at this folder or above it."""
        if self.is_s3:
            return
        root = Path(self.root)
        above = next(path for path in (root, *root.parents) if path.exists())
        if not above.is_dir():
            raise BadInput(f"{option} {self.uri}: {above} is a file", "Give a folder")

    def path(self, path: str = "") -> str:
        """The full path for ``self.filesystem``."""
        return f"{self.root}/{path}" if path else self.root

    def delta_uri(self, table: str) -> str:
        return f"{self.uri}/{table}"

    @property
    def delta_options(self) -> dict[str, str]:
        """``storage_options`` for deltalake; commits on S3 go by conditional PUT."""
        return delta_options() if self.is_s3 else {}

    def retry(self, action: Callable[[], Result], *also: type[Exception]) -> Result:
        """The result of an action that may be done twice; on S3 as ``coca.s3.retry``, on disk it is done once."""
        return retry(self.uri, action, *also) if self.is_s3 else action()

    def exists(self, path: str) -> bool:
        return self._type_of(path) != pafs.FileType.NotFound

    def is_folder(self, path: str) -> bool:
        return self._type_of(path) == pafs.FileType.Directory

    def _type_of(self, path: str) -> pafs.FileType:
        return self.retry(lambda: self.filesystem.get_file_info(self.path(path)).type)

    def size(self, path: str) -> int:
        """Bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.is_s3:
            return self.retry(lambda: self._s3.size(path))
        info = self.filesystem.get_file_info(self.path(path))
        if info.type != pafs.FileType.File:
            raise FileNotFoundError(f"{self.uri}/{path}")
        return int(info.size)

    def list(self, path: str = "") -> list[str]:
        """Names directly under a folder, sorted; empty where it does not exist.

        What a writer has not finished, or was killed over, has no name yet.
        """
        selector = pafs.FileSelector(self.path(path), allow_not_found=True)
        names = self.retry(lambda: [info.base_name for info in self.filesystem.get_file_info(selector)])
        return sorted(name for name in names if self.is_s3 or not _STAGED.fullmatch(name))

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        if self.is_s3:
            return self.retry(lambda: self._s3.read(path))
        # pyarrow would unpack what is named .gz.
        with self.filesystem.open_input_stream(self.path(path), compression=None) as stream:
            return bytes(stream.read())

    def open(self, path: str) -> pa.NativeFile:
        """A file to be read in places.

        Raises:
            FileNotFoundError: there is none.
        """
        return self.retry(lambda: self._open(path))

    def _open(self, path: str) -> pa.NativeFile:
        source = self.filesystem.open_input_file(self.path(path))
        # pyarrow takes a length that an answer has lost for 0, and reads an empty file.
        if self.is_s3 and source.size() == 0 and self.size(path):
            raise CutShort(f"{self.uri}/{path} was opened as an empty file")
        return source

    def write(self, path: str, data: bytes) -> None:
        """Write or replace a file as a whole: a reader sees the old bytes or the new, never a part."""
        if self.is_s3:
            self.retry(lambda: self._s3.write(path, data))
            return
        target = Path(self.path(path))
        staged = _stage(target, data)
        os.replace(staged, target)
        _sync_folder(target.parent)

    def write_checked(self, path: str, data: bytes, check: Callable[[], None]) -> None:
        """Write or replace a file for whoever has the right to it; ``check`` raises where that was lost.

        On S3 a write that was long under way does not land on a file that somebody has written since the check.
        """
        if self.is_s3:
            self.retry(lambda: self._s3.write_checked(path, data, check))
            return
        target = Path(self.path(path))
        staged = _stage(target, data)
        try:
            check()
            os.replace(staged, target)
        finally:
            staged.unlink(missing_ok=True)
        _sync_folder(target.parent)

    def write_once(self, path: str, data: bytes) -> bool:
        """Create a file only if it is not there (conditional PUT).

        Returns:
            False where it was there already with other bytes; they are untouched.
        """
        if self.is_s3:
            return self.retry(lambda: self._s3.write_once(path, data))
        target = Path(self.path(path))
        staged = _stage(target, data)
        try:
            os.link(staged, target)
        except FileExistsError:
            return target.read_bytes() == data
        finally:
            staged.unlink()
        _sync_folder(target.parent)
        return True

    def delete(self, path: str) -> None:
        """Remove a file or a folder with all in it; nothing happens where there is none."""
        with contextlib.suppress(FileNotFoundError):
            if self.is_s3:
                self.retry(lambda: self._s3.delete(path))
            elif self.is_folder(path):
                self.filesystem.delete_dir(self.path(path))
            else:
                self.filesystem.delete_file(self.path(path))

    def sweep_unfinished(self, path: str) -> None:
        """Remove what killed processes have left of files that they were writing, anywhere under a folder.

        On S3 that are uploads in parts, which no listing shows and which are paid for. Where the right to list them is
        lacking, or the store does not tell, they stay: a rule of the bucket's lifecycle removes them.

        Only for who alone writes there: a write that is under way fails, on disk, or has to begin anew, on S3.
        """
        if self.is_s3:
            with contextlib.suppress(OSError):  # what stays costs a little: no reason to end what works
                self.retry(lambda: self._s3.abort_uploads(path))
            return
        for staged in [each for each in Path(self.path(path)).rglob(".*.tmp") if _STAGED.fullmatch(each.name)]:
            staged.unlink(missing_ok=True)


def open_file(uri: str | os.PathLike[str]) -> tuple[Store, str]:
    """A file's uri as (store of its folder, name)."""
    text = os.fspath(uri)
    folder, _, name = text.rstrip("/").rpartition("/")
    if not folder and not _SCHEME.match(text):
        folder = "/" if text.startswith("/") else "."
    return Store(folder), name


def _stage(target: Path, data: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    with staged.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    return staged


def _sync_folder(folder: Path) -> None:
    # A rename is durable only once its folder is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
