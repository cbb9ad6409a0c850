"""Reading the output of img2dataset: its parquet and webdataset shards, every row of them, failures too.

The layout is that of its ``writer.py`` and ``downloader.py`` (rom1504/img2dataset 1.47): ``NNNNN.parquet`` with one
row for each link and, in the parquet output, the bytes in a column named jpg, png or webp; in the webdataset output
``NNNNN.tar`` holds the successes as ``<key>.jpg``, ``.txt`` and ``.json``; ``NNNNN_stats.json`` is written last.
"""

import io
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from coca.errors import BadInput
from coca.storage import Store, open_file
from pipelines.link_formats import encode_extra
from pipelines.tar_members import read_members

SUCCESS, TOO_LARGE, MISSING = "success", "body_too_large", "image_missing"
MAX_BODY_BYTES = 20 * 1024 * 1024

_IMAGE_COLUMNS = ("jpg", "jpeg", "png", "webp")
# What img2dataset adds to the columns of its input; exif is not kept (it may hold places and names).
_OWN_COLUMNS = {"key", "status", "error_message", "width", "height", "original_width", "original_height"}
_OWN_COLUMNS |= {"url", "caption", "sha256", "exif", "txt", *_IMAGE_COLUMNS}
_MEMBER_NAME = re.compile(r"^((?:.*/)?[^./]+)\.([^/]*)$", re.DOTALL)
_MAX_TEXT_BYTES = 1 << 20
_BATCH_ROWS = 16
_READ_BYTES = 4 << 20
_LISTING_THREADS = 8


@dataclass(frozen=True)
class Shard:
    """One shard, the unit of reading; travels to workers."""

    uri: str
    kind: Literal["parquet", "webdataset"]
    index_uri: str | None
    """The table beside a tar, which also holds what failed."""
    rows: int | None
    """None where only a tar is there."""
    written_at: datetime
    fingerprint: str


@dataclass(frozen=True)
class ImportedRow:
    """One link of a shard, as img2dataset left it."""

    url: str | None
    caption: str | None
    extra: str | None
    """The other columns of the links table, as a JSON object."""
    body: bytes | None
    status: str | None
    """img2dataset's: success, failed_to_download, failed_to_resize; or body_too_large, image_missing by this reader."""
    error_message: str | None
    original_width: int | None
    original_height: int | None
    source_sha256: str | None
    """Of the bytes that img2dataset fetched, where it was told to hash them."""
    imported_at: datetime
    """When the shard was written."""


def list_shards(source: str) -> list[Shard]:
    """The shards of a folder on disk or S3, in the order of their names.

    Raises:
        BadInput: no output of img2dataset there, a shard that it did not finish or that is gone, or tables without
            images.
    """
    store = Store(source)
    files = _list_files(store)
    stems = sorted({name.rpartition(".")[0] for name in files if name.endswith((".tar", ".parquet"))})
    if not stems:
        raise BadInput(
            f"{store.uri} holds no img2dataset output", "Give the folder with its NNNNN.tar or NNNNN.parquet files"
        )
    _check_finished(store, files, stems)
    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        return list(threads.map(lambda stem: _describe(store, files, stem), stems))


def read_shard(shard: Shard, *, max_body_bytes: int = MAX_BODY_BYTES) -> Iterator[ImportedRow]:
    """Every row of a shard, one at a time.

    Raises:
        BadInput: the shard is damaged; the rows before that place have been yielded, so publish none of them.
    """
    try:
        if shard.kind == "parquet":
            for record in _read_records(shard.uri):
                body = next((record[name] for name in _IMAGE_COLUMNS if isinstance(record.get(name), bytes)), None)
                yield _row(record, body, shard, max_body_bytes)
        else:
            yield from _read_tar(shard, max_body_bytes)
    except (pa.ArrowInvalid, OSError) as error:
        problem = " ".join(str(error).split())
        raise BadInput(f"{shard.uri} cannot be read: {problem}", "The shard is damaged: make it anew") from None


def _list_files(store: Store) -> dict[str, pafs.FileInfo]:
    selector = pafs.FileSelector(store.path(), allow_not_found=True)
    try:
        found = store.filesystem.get_file_info(selector)
    except NotADirectoryError:
        raise BadInput(f"{store.uri} is a file", "Give the folder that img2dataset wrote") from None
    return {info.base_name: info for info in found if info.type == pafs.FileType.File}


def _check_finished(store: Store, files: dict[str, pafs.FileInfo], stems: list[str]) -> None:
    done = {name.removesuffix("_stats.json") for name in files if name.endswith("_stats.json")}
    gone, unfinished = sorted(done - set(stems)), [stem for stem in stems if stem not in done]
    if gone:
        raise BadInput(
            f"{store.uri} has no shard {gone[0]}, though {gone[0]}_stats.json says that it was written",
            "Bring it back, or take that file away too",
        )
    if done and unfinished:
        raise BadInput(
            f"img2dataset did not finish {len(unfinished):,} shards of {store.uri}, the first is {unfinished[0]}",
            "Run it again to the end, or take these shards away",
        )


def _describe(store: Store, files: dict[str, pafs.FileInfo], stem: str) -> Shard:
    tar, table = files.get(f"{stem}.tar"), f"{stem}.parquet"
    columns, rows = _read_footer(store, table) if table in files else ([], None)
    if tar is None and not set(columns) & set(_IMAGE_COLUMNS):
        raise BadInput(
            f"{store.uri}/{table} holds no images: it has {', '.join(columns)}",
            "Only the parquet and webdataset outputs of img2dataset can be imported",
        )
    indexed = {"url", "key", "status"} <= set(columns)
    info = tar or files[table]
    return Shard(
        uri=f"{store.uri}/{info.base_name}",
        kind="webdataset" if tar else "parquet",
        index_uri=f"{store.uri}/{table}" if tar and indexed else None,
        rows=rows if indexed or not tar else None,
        written_at=info.mtime,
        fingerprint=f"{info.size}|{info.mtime_ns}",
    )


def _read_footer(store: Store, name: str) -> tuple[list[str], int]:
    try:
        with store.filesystem.open_input_file(store.path(name)) as source:
            file = pq.ParquetFile(source)
            return file.schema_arrow.names, file.metadata.num_rows
    except (pa.ArrowInvalid, OSError) as error:
        problem = " ".join(str(error).split())
        raise BadInput(f"{store.uri}/{name} cannot be read: {problem}", "The shard is damaged: make it anew") from None


def _read_records(uri: str) -> Iterator[dict[str, Any]]:
    store, name = open_file(uri)
    with store.filesystem.open_input_file(store.path(name)) as source:
        file = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
            batch.validate(full=True)  # texts that are no UTF-8
            yield from batch.to_pylist()


def _read_tar(shard: Shard, max_body_bytes: int) -> Iterator[ImportedRow]:
    store, name = open_file(shard.uri)
    keys: set[str] = set()
    with store.filesystem.open_input_stream(store.path(name), compression=None) as source:
        caps = {"json": _MAX_TEXT_BYTES, "txt": _MAX_TEXT_BYTES, **dict.fromkeys(_IMAGE_COLUMNS, max_body_bytes)}
        buffered = io.BufferedReader(source, buffer_size=_READ_BYTES)
        for key, parts in _group(buffered, caps, shard.uri):
            keys.add(key)
            record = _read_json(parts.get("json"))
            if record.get("caption") is None and parts.get("txt"):
                record["caption"] = parts["txt"].decode(errors="replace")
            image = next((column for column in _IMAGE_COLUMNS if column in parts), None)
            too_large = image is not None and parts[image] is None
            if too_large:
                record["status"] = TOO_LARGE
            yield _row(record, parts[image] if image else None, shard, max_body_bytes)
    for record in _read_records(shard.index_uri) if shard.index_uri else ():
        if record.get("key") not in keys:
            yield _row(record, None, shard, max_body_bytes)


def _group(source: io.BufferedReader, caps: dict[str, int], shown: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Neighbouring members of one key as extension -> bytes, as webdataset groups them."""
    key = ""
    parts: dict[str, Any] = {}
    for member in read_members(source, lambda name: caps.get(_split_name(name)[1], 0), shown):
        prefix, extension = _split_name(member.name)
        if parts and (prefix != key or extension in parts):
            yield key, parts
            parts = {}
        key = prefix
        parts[extension] = member.data
    if parts:
        yield key, parts


def _split_name(name: str) -> tuple[str, str]:
    """A member's (key, extension): the extension begins at the first dot behind the last slash."""
    match = _MEMBER_NAME.match(name)
    return (match[1], match[2].lower()) if match else (name, "")


def _read_json(data: bytes | None) -> dict[str, Any]:
    """A sample's metadata; without a url it will be refused by that name."""
    try:
        record = json.loads(data or b"{}")
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _row(record: dict[str, Any], body: bytes | None, shard: Shard, max_body_bytes: int) -> ImportedRow:
    status = _text(record.get("status"))
    if body is not None and len(body) > max_body_bytes:
        body, status = None, TOO_LARGE
    elif body is None and status in (SUCCESS, None):
        status = MISSING
    rest = _other_columns(record)
    digest = _text(record.get("sha256")) or ""
    return ImportedRow(
        url=_text(record.get("url")),
        caption=_text(record.get("caption")),
        extra=encode_extra([rest])[0].as_py() if rest else None,
        body=body,
        status=status,
        error_message=_text(record.get("error_message")),
        original_width=_pixels(record.get("original_width")),
        original_height=_pixels(record.get("original_height")),
        source_sha256=digest if re.fullmatch("[0-9a-f]{64}", digest) else None,
        imported_at=shard.written_at,
    )


def _other_columns(record: dict[str, Any]) -> dict[str, Any]:
    mine = record.get("coca")  # a tar of our own export
    if isinstance(mine, dict):
        return mine["extra"] if isinstance(mine.get("extra"), dict) else {}
    return {name: value for name, value in record.items() if name not in _OWN_COLUMNS}


def _text(value: Any) -> str | None:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return str(value) if isinstance(value, int | float) and value == value else None


def _pixels(value: Any) -> int | None:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**31:
        return int(value)
    return None
