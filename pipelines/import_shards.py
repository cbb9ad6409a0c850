"""img2dataset's shards as rows of a refresh: what it fetched stands for the fetch, its failures become reasons."""

import dataclasses

from coca.contract import Reason
from pipelines.img2dataset_engine import reason_of_error
from pipelines.img2dataset_shards import MISSING, TOO_LARGE, ImportedRow, Shard, list_shards, read_shard
from pipelines.prepare import Prepared

__all__ = ["ImportedRow", "Shard", "import_reason", "list_shards", "read_shard", "restore_source"]

_RESIZE_ERRORS = {
    "image too small": Reason.IMAGE_TOO_SMALL,
    "image area too large": Reason.TOO_MANY_PIXELS,
    "aspect ratio too large": Reason.ASPECT_RATIO,
}


def import_reason(row: ImportedRow) -> Reason | None:
    """Why img2dataset has no image for this link; None where it has one."""
    message = row.error_message or ""
    if row.status == "failed_to_download":
        return Reason.CORRUPT_IMAGE if message == "hash mismatch" else reason_of_error(message)[0]
    if row.status == "failed_to_resize":
        return _RESIZE_ERRORS.get(message, Reason.CORRUPT_IMAGE)
    if row.status == TOO_LARGE:
        return Reason.BODY_TOO_LARGE
    return Reason.BODY_INCOMPLETE if row.status == MISSING or row.body is None else None


def restore_source(row: ImportedRow, prepared: Prepared) -> Prepared:
    """What the preparing of a row's body gave, with the size and the digest of what img2dataset fetched, where it
    says them: its shard holds the picture resized."""
    stored = prepared.stored
    if stored is not None and row.original_width and row.original_height:
        stored = dataclasses.replace(stored, original_width=row.original_width, original_height=row.original_height)
    return dataclasses.replace(prepared, stored=stored, source_sha256=row.source_sha256 or prepared.source_sha256)
