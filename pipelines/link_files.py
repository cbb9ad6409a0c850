"""The files of a table of links: found by path, folder or pattern on disk and S3, or fetched by https."""

import fnmatch
import http.client
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from coca.errors import BadInput
from coca.storage import Store, open_file

PARQUET = (".parquet", ".pq")
TEXT = (".csv", ".tsv", ".jsonl", ".ndjson")
SUFFIXES = (*PARQUET, *TEXT, *(f"{suffix}.gz" for suffix in TEXT))
_FETCH_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class LinkFile:
    """One file; ``fingerprint`` changes when its content does, as far as a listing tells."""

    uri: str
    fingerprint: str
    size: int | None = None
    """Bytes, where a listing tells."""

    @property
    def shown(self) -> str:
        """Its uri for people: without a query, which may hold a signature."""
        return self.uri.partition("?")[0] if is_web(self.uri) else self.uri


def is_web(uri: str) -> bool:
    return uri.lower().startswith(("https://", "http://"))


def kind_of(uri: str) -> str:
    """parquet, csv, tsv or jsonl, by the name."""
    path = urlsplit(uri).path if is_web(uri) else uri
    suffix = path.removesuffix(".gz").rpartition(".")[2]
    return {"pq": "parquet", "ndjson": "jsonl"}.get(suffix, suffix)


def find_files(uri: str) -> list[LinkFile]:
    """The files that ``uri`` means, in the order of their names; hidden ones in folders are left out.

    Raises:
        BadInput: nothing there, or a file whose name tells no format.
    """
    if is_web(uri):
        _check_suffix(uri.partition("?")[0], urlsplit(uri).path)
        with _open_url(uri) as response:
            stamps = [response.headers.get(name, "") for name in ("Content-Length", "ETag", "Last-Modified")]
        return [LinkFile(uri, "|".join(stamps))]
    plain, wild = _split_pattern(uri)
    if wild:
        store = Store(plain)
        found = {name: info for name, info in _list_files(store).items() if _matches(name, wild)}
        missing = f"no file matches {uri}"
    else:
        store, name = open_file(uri)
        info = store.filesystem.get_file_info(store.path(name))
        if info.type == pafs.FileType.File:
            _check_suffix(uri, name)
            return [LinkFile(f"{store.uri}/{name}", _fingerprint(info), info.size)]
        missing = f"the links table {uri} does not exist"
        if info.type == pafs.FileType.Directory:
            missing = f"the folder {uri} holds no {', '.join((*PARQUET, *TEXT))} file"
        store = Store(uri)
        found = {name: info for name, info in _list_files(store).items() if name.endswith(SUFFIXES)}
    if not found:
        raise BadInput(missing, "Give a Parquet, CSV, TSV or JSON lines file, a folder of them, or a pattern")
    for name in found:
        _check_suffix(uri, name)
    return [LinkFile(f"{store.uri}/{name}", _fingerprint(found[name]), found[name].size) for name in sorted(found)]


@contextmanager
def open_table(uri: str, max_download_bytes: int) -> Iterator[pa.NativeFile]:
    """A file to read from: seekable where it is Parquet, otherwise a stream, decompressed.

    Raises:
        BadInput: it cannot be fetched, or is larger than ``max_download_bytes``.
        OSError: it cannot be opened.
    """
    if is_web(uri):
        with tempfile.NamedTemporaryFile(prefix="coca-links-") as copy:
            _download(uri, copy, max_download_bytes)
            with _open(*open_file(copy.name), urlsplit(uri).path) as source:
                yield source
        return
    store, name = open_file(uri)
    with _open(store, name, name) as source:
        yield source


def _open(store: Store, path: str, name: str) -> pa.NativeFile:
    source = store.open(path)
    return pa.CompressedInputStream(source, "gzip") if name.endswith(".gz") else source


def _fingerprint(info: pafs.FileInfo) -> str:
    return f"{info.size}|{info.mtime_ns}"


def _split_pattern(uri: str) -> tuple[str, str]:
    """The part of a uri before its first segment with a wildcard, and the rest."""
    segments = uri.split("/")
    for place, segment in enumerate(segments):
        if any(sign in segment for sign in "*?["):
            folder = "/".join(segments[:place])
            return folder or ("/" if uri.startswith("/") else "."), "/".join(segments[place:])
    return uri, ""


def _matches(name: str, pattern: str) -> bool:
    """Segment by segment: ``*`` does not cross a slash."""
    names, patterns = name.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def _list_files(store: Store) -> dict[str, pafs.FileInfo]:
    """Files below a store by their path relative to it; hidden ones left out."""
    selector = pafs.FileSelector(store.path(), recursive=True, allow_not_found=True)
    found = (info for info in store.filesystem.get_file_info(selector) if info.type == pafs.FileType.File)
    relative = {info.path[len(store.root.rstrip("/")) + 1 :]: info for info in found}
    hidden = (".", "_")
    return {name: relative[name] for name in relative if not any(p.startswith(hidden) for p in name.split("/"))}


def _check_suffix(uri: str, name: str) -> None:
    if not name.endswith(SUFFIXES):
        raise BadInput(
            f"{uri}: {name.rpartition('/')[2]} is no Parquet, CSV, TSV or JSON lines file by its name",
            f"Name it {', '.join((*PARQUET, *TEXT))} (text also .gz)",
        )


@contextmanager
def _open_url(url: str) -> Iterator[http.client.HTTPResponse]:
    shown = url.partition("?")[0]
    request = urllib.request.Request(url, headers={"User-Agent": "coca"})  # noqa: S310 - http(s) only, by is_web
    try:
        with urllib.request.urlopen(request, timeout=_FETCH_TIMEOUT_S) as response:  # noqa: S310
            yield response
    except urllib.error.HTTPError as error:
        raise BadInput(f"{shown} answers {error.code} {error.reason}", "Check the address of the table") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise BadInput(f"{shown} cannot be fetched: {reason}", "Check the address, or download it yourself") from None


def _download(url: str, copy: Any, max_bytes: int) -> None:
    shown, total = url.partition("?")[0], 0
    with _open_url(url) as response:
        announced = response.headers.get("Content-Length")
        while chunk := response.read(_CHUNK_BYTES):
            total += len(chunk)
            if total > max_bytes:
                way_out = "Download it yourself, or raise links.max_download_bytes"
                raise BadInput(f"{shown} is larger than {max_bytes:,} bytes", way_out)
            copy.write(chunk)
        # http.client says nothing of a body that ends early where it is read in pieces.
        if announced is not None and announced.isdecimal() and total != int(announced):
            raise BadInput(f"{shown} ended after {total:,} of {int(announced):,} bytes", "Try again")
    copy.flush()
