"""A folder on S3: what `coca.storage.Store` does there, one try of each; the store tries again."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import pyarrow.fs as pafs

from coca.errors import BadInput
from coca.s3 import CutShort, retry, s3_client, s3_filesystem, status_of

_ONE_REQUEST_BYTES = 10 * 2**20
_CONFLICT, _PRECONDITION_FAILED, _NOT_IMPLEMENTED = 409, 412, 501


class S3Folder:
    """Keys of one bucket below one prefix. Paths given to methods are relative to it.

    Raises, in all methods, besides what each says:
        FileNotFoundError: no such object, or no such bucket.
        OSError, botocore.exceptions.ClientError, BotoCoreError: S3 has failed or refused it.
    """

    def __init__(self, root: str) -> None:
        """
        Args:
            root: bucket and prefix, ``bucket/a/b`` or ``bucket``.
        """
        self._root = root
        self._bucket, _, self._prefix = root.partition("/")

    @cached_property
    def filesystem(self) -> pafs.S3FileSystem:
        return s3_filesystem()

    @cached_property
    def client(self) -> Any:
        return s3_client()

    def size(self, path: str) -> int:
        return _whole(self._call("head_object", path))

    def read(self, path: str) -> bytes:
        answer = self._call("get_object", path)
        data = bytes(answer["Body"].read())
        if len(data) != _whole(answer):
            raise CutShort(f"s3://{self._root}/{path} was read to byte {len(data):,} only")
        return data

    def write(self, path: str, data: bytes) -> None:
        """In parts side by side, where there is much; else in one request, which leaves nothing half done."""
        if len(data) <= _ONE_REQUEST_BYTES:
            self._call("put_object", path, Body=data)
            return
        # Opened at once, not with ``allow_delayed_open``: that puts an empty object where its upload cannot begin.
        with self.filesystem.open_output_stream(f"{self._bucket}/{self._key(path)}", compression=None) as stream:
            stream.write(data)

    def write_checked(self, path: str, data: bytes, check: Callable[[], None]) -> None:
        """Raises OSError where somebody else has written it since ``check``."""
        from botocore.exceptions import ClientError

        try:
            standing = {"IfMatch": self._call("head_object", path)["ETag"]}
        except FileNotFoundError:
            standing = {"IfNoneMatch": "*"}
        check()
        try:
            self._call("put_object", path, Body=data, **standing)
        except ClientError as error:
            # Where the answer to ours was lost it lies there now; else somebody else's does.
            if status_of(error) not in (_CONFLICT, _PRECONDITION_FAILED):
                raise
            if not self._holds(path, data):
                raise OSError(f"s3://{self._root}/{path} was written by somebody else meanwhile") from None

    def write_once(self, path: str, data: bytes, retries: int = 8) -> bool:
        """Whether it holds ``data`` now; False where it was there with other bytes.

        Raises:
            BadInput: the store has no conditional writes.
        """
        from botocore.exceptions import ClientError

        try:
            self._call("put_object", path, Body=data, IfNoneMatch="*")
        except ClientError as error:
            status = status_of(error)
            if status == _PRECONDITION_FAILED:
                # Ours, where an answer was lost and the client has asked again; else another's.
                return self._holds(path, data)
            if status == _CONFLICT and retries:  # another conditional write was under way: S3 asks to try again
                time.sleep(random.uniform(0.1, 0.5))
                return self.write_once(path, data, retries - 1)
            if status == _NOT_IMPLEMENTED:
                raise BadInput(
                    f"the store behind s3://{self._root} does not support conditional writes",
                    "Use one that honours If-None-Match",
                ) from None
            raise
        return True

    def delete(self, path: str) -> None:
        """An object, and all below it as a folder; nothing happens where there is neither."""
        with contextlib.suppress(FileNotFoundError):  # as some stores say where there was none
            self._call("delete_object", path)
        for page in self._pages("list_objects_v2", path):
            keys = [{"Key": each["Key"]} for each in page.get("Contents", [])]
            if keys:
                answer = self.client.delete_objects(Bucket=self._bucket, Delete={"Objects": keys, "Quiet": True})
                for failed in answer.get("Errors", []):
                    kind = PermissionError if failed.get("Code") == "AccessDenied" else OSError
                    raise kind(f"s3://{self._bucket}/{failed['Key']} was not deleted: {failed.get('Message')}")

    def abort_uploads(self, path: str) -> None:
        """Drop what was uploaded in parts and never ended, below a folder, as far as the store and our rights allow."""
        from botocore.exceptions import ClientError

        try:
            pages = list(self._pages("list_multipart_uploads", path))
        except ClientError as error:
            if status_of(error) in (403, 405, _NOT_IMPLEMENTED):  # it may not be known, or cannot
                return
            raise
        for upload in [each for page in pages for each in page.get("Uploads", [])]:
            where = {"Bucket": self._bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            try:
                self.client.abort_multipart_upload(**where)
            except ClientError as error:
                if status_of(error) not in (403, 404):  # 404: it has ended meanwhile
                    raise

    def _holds(self, path: str, data: bytes) -> bool:
        return retry(f"s3://{self._root}", lambda: self.read(path)) == data

    def _pages(self, method: str, path: str) -> Iterator[dict[str, Any]]:
        """Answers of a listing of all below ``path``."""
        key = self._key(path)
        with self._told_missing(path):
            yield from self.client.get_paginator(method).paginate(Bucket=self._bucket, Prefix=f"{key}/" if key else "")

    def _call(self, method: str, path: str, **arguments: Any) -> dict[str, Any]:
        with self._told_missing(path):
            return dict(getattr(self.client, method)(Bucket=self._bucket, Key=self._key(path), **arguments))

    def _key(self, path: str) -> str:
        return "/".join(filter(None, (self._prefix, path)))

    @contextlib.contextmanager
    def _told_missing(self, path: str) -> Iterator[None]:
        from botocore.exceptions import ClientError

        try:
            yield
        except ClientError as error:
            if status_of(error) == 404:
                gone = "NoSuchBucket" in str(error)
                lacking = f"the bucket {self._bucket} does not exist (NoSuchBucket)" if gone else ""
                raise FileNotFoundError(lacking or f"s3://{self._root}/{path}") from None
            raise


def _whole(answer: dict[str, Any]) -> int:
    """The length that an answer tells; one that was cut off in its head tells none."""
    if "ContentLength" not in answer:
        raise CutShort("an answer of S3 ended in its head")
    return int(answer["ContentLength"])
