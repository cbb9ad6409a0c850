"""The manifest of a checkpoint folder: size and SHA-256 of every file in it, written last."""

import errno
import hashlib
import json
from typing import Any

from coca.errors import BadInput
from coca.s3 import CutShort
from coca.storage import Store

MANIFEST = "manifest.json"
DAMAGED = "The checkpoint is damaged: use another"
_CHUNK_BYTES = 8 << 20

Entry = dict[str, Any]
"""``bytes`` and ``sha256`` of a file; whatever stands there in a manifest that was read."""


def file_entry(data: bytes) -> Entry:
    """What a manifest says of a file."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_manifest(store: Store, path: str, entries: dict[str, Entry]) -> None:
    """Make a checkpoint of the folder ``path``: all its files are there by now, with the names relative to it."""
    files = dict(sorted(entries.items()))
    store.write(f"{path}/{MANIFEST}", json.dumps({"files": files}, indent=1).encode())


def read_manifest(store: Store) -> tuple[dict[str, Entry], bytes]:
    """The entries of the manifest of a checkpoint folder, and its bytes.

    Raises:
        BadInput: there is none, or it is damaged.
    """
    try:
        data = store.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(
            f"{store.uri} is not a checkpoint: it holds no {MANIFEST}",
            "Name a folder that `coca train` wrote",
        ) from None
    entries = read_json(data, store, MANIFEST).get("files")
    return (entries if isinstance(entries, dict) else {}), data


def read_json(data: bytes, store: Store, name: str) -> dict[str, Any]:
    """
    Raises:
        BadInput: ``data``, the bytes of the file ``name``, is no JSON object.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{store.uri}/{name} is not JSON: {error}", DAMAGED) from None
    if not isinstance(values, dict):
        raise BadInput(f"{store.uri}/{name} holds no JSON object", DAMAGED)
    return values


def read_listed(store: Store, name: str, entries: dict[str, Entry]) -> bytes:
    """The bytes of a file that a manifest lists.

    Raises:
        BadInput: it is not listed, missing, or differs from what the manifest says.
    """
    if name not in entries:
        raise BadInput(f"{store.uri} lists no {name}", "It cannot be used for this: name another checkpoint")
    try:
        data = store.read(name)
    except FileNotFoundError:
        raise BadInput(f"{store.uri}/{name} is missing", DAMAGED) from None
    if entries[name] != file_entry(data):
        raise BadInput(f"{store.uri}/{name} does not match its SHA-256 in the manifest", DAMAGED)
    return data


def find_damage(store: Store, name: str, entry: Entry) -> str | None:
    """What is wrong with a file of a checkpoint folder, for people; None where it is what its manifest says.

    Reads it in pieces, so that a file of any size can be verified.
    """
    if not isinstance(entry, dict):
        return f"{MANIFEST} has no size and SHA-256 of {name}"
    try:
        size = store.size(name)
        if size != entry.get("bytes"):
            return f"{name} has {size:,} bytes where the manifest says {entry.get('bytes')}"
        matches = store.retry(lambda: _sha256(store, name, size)) == entry.get("sha256")
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return f"{name} cannot be read: {error.strerror}"
    return None if matches else f"{name} does not match its SHA-256 in the manifest"


def _sha256(store: Store, name: str, size: int) -> str:
    digest = hashlib.sha256()
    with store.open(name) as stream:
        while size > 0:
            chunk = stream.read(min(size, _CHUNK_BYTES))
            if not chunk:
                raise CutShort(f"{store.uri}/{name} ends {size:,} bytes early")
            digest.update(chunk)
            size -= len(chunk)
    return digest.hexdigest()
