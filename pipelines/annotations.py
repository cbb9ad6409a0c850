"""Annotation files: written beside their samples files, and put in place of a whole table."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

from coca.contract import ANNOTATIONS, ROW_GROUPS, TableVersion
from coca.storage import Store
from pipelines.lease import Lease
from pipelines.staging import encode_table
from pipelines.tables import DataFile, open_table, replace_files
from pipelines.tasks import StartRay, run_tasks

Part = TypeVar("Part")

# Most of the time of a small file is waiting for the store.
_THREADS = 8


class AnnotationFile(BaseModel):
    """A file of the annotations table, written and not committed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples_path: str
    file: DataFile
    group_rows: tuple[int, ...]
    group_selected: tuple[int, ...]
    """Rows and selected rows of each row group."""

    def row_groups(self) -> list[dict[str, object]]:
        """Its rows of ``contract.ROW_GROUPS``."""
        return [
            {
                "samples_path": self.samples_path,
                "annotations_path": self.file.path,
                "row_group": number,
                "rows": rows,
                "selected": selected,
            }
            for number, (rows, selected) in enumerate(zip(self.group_rows, self.group_selected, strict=True))
        ]


def write_annotations(
    store: Store, name: str, rows: pa.Table, rows_per_row_group: int, *, samples_path: str
) -> AnnotationFile:
    """Write ``rows`` (``contract.ANNOTATIONS``, in the order of the samples file) as ``annotations/<name>``."""
    data = encode_table(rows.select(ANNOTATIONS.names).cast(ANNOTATIONS), rows_per_row_group)
    store.write(f"annotations/{name}", data)
    starts = range(0, rows.num_rows, rows_per_row_group)
    groups = [rows["selected"].slice(start, rows_per_row_group) for start in starts]
    return AnnotationFile(
        samples_path=samples_path,
        file=DataFile(path=name, size=len(data), rows=rows.num_rows),
        group_rows=tuple(len(group) for group in groups),
        group_selected=tuple(pc.sum(group).as_py() for group in groups),
    )


def with_selection(rows: pa.Table, reason: pa.Array) -> pa.Table:
    """Annotations with ``selected`` and ``reason`` by reasons in their order, null where a row is selected."""
    selected = pc.is_null(reason)
    place = {name: rows.schema.get_field_index(name) for name in ("selected", "reason")}
    rows = rows.set_column(place["selected"], ANNOTATIONS.field("selected"), selected)
    return rows.set_column(place["reason"], ANNOTATIONS.field("reason"), reason)


def with_scores(rows: pa.Table, scores: pa.Table) -> pa.Table:
    """Annotations with further scores; one of the same name gives way.

    Args:
        scores: ``sample_id`` and ``scores`` of the same rows in the same order.
    """
    merged = [
        list({**dict(old or ()), **dict(new or ())}.items()) or None
        for old, new in zip(rows["scores"].to_pylist(), scores["scores"].to_pylist(), strict=True)
    ]
    kind = ANNOTATIONS.field("scores")
    return rows.set_column(rows.schema.get_field_index("scores"), kind, pa.array(merged, kind.type))


def reasons_of(sample_ids: pa.ChunkedArray, unselected: pa.Table) -> pa.Array:
    """The reason of each row by its id, null where it is selected."""
    if not unselected.num_rows:
        return pa.nulls(len(sample_ids), pa.string())
    places = pc.index_in(sample_ids, value_set=unselected["sample_id"].combine_chunks())
    taken = unselected["reason"].take(places)
    return taken.combine_chunks() if isinstance(taken, pa.ChunkedArray) else taken


def changed_rows(before: pa.Table, after: pa.Table) -> np.ndarray:
    """Which annotations have another verdict."""
    old, new = (pc.fill_null(rows["reason"], "") for rows in (before, after))
    return np.asarray(pc.not_equal(old, new).to_numpy())


def rewrite_parts(
    function: Callable[[Part], dict[str, Any]], parts: Sequence[Part], *, start_ray: StartRay | None
) -> list[dict[str, Any]]:
    """``function`` of each part, in their order: as Ray tasks where ``start_ray`` is given, else in threads here."""
    if start_ray is not None:
        return run_tasks(function, parts, start_ray=start_ray)
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(function, parts))


def replace_annotations(store: Store, files: Sequence[AnnotationFile], name: str, lease: Lease) -> TableVersion:
    """Commit ``files`` as the whole annotations table; done before under ``name``, this changes nothing.

    Raises:
        RunFailed: a file is not there with its size, or the lease is lost.
    """
    wanted = [each.file for each in files]
    replace_files(store, "annotations", wanted, name, lease)
    version = open_table(store, "annotations").version()
    return TableVersion(delta_version=version, files=len(wanted), rows=sum(file.rows for file in wanted))


def row_groups_of(files: Sequence[AnnotationFile]) -> pa.Table:
    """``contract.ROW_GROUPS`` of a whole version."""
    return pa.Table.from_pylist([row for each in files for row in each.row_groups()], schema=ROW_GROUPS)


def rewrite_name(kind: str, *settings: object) -> str:
    """The name of a rewrite: the same settings give the same files, so that a killed one is done again over itself."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{kind}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
