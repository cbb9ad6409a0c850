"""Annotation files: written beside their samples files, and put in place of a whole table."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, PostCommitHookProperties, Transaction
from deltalake.transaction import AddAction
from pydantic import BaseModel, ConfigDict

from coca.contract import ANNOTATIONS, ROW_GROUPS, TableVersion, row_groups_path
from coca.errors import RunFailed
from coca.storage import Store
from pipelines.lease import Lease
from pipelines.staging import encode_table
from pipelines.tables import SCHEMAS, DataFile, open_table, table_files
from pipelines.tasks import StartRay, run_tasks

Part = TypeVar("Part")

# Most of the time of a small file is waiting for the store.
_THREADS = 8

# As everywhere: expired log entries would take away what older version records name.
_KEEP_LOGS = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)


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
    table = open_table(store, "annotations")
    wanted = {each.file.path: each.file for each in files}
    if table.transaction_version(name) is None or table_files(table).keys() != wanted.keys():
        for file in wanted.values():
            _check_file(store, file)
        lease.check()
        table.create_write_transaction(
            actions=[_add_action(file) for file in wanted.values()],
            mode="overwrite",
            schema=SCHEMAS["annotations"],
            commit_properties=CommitProperties(app_transactions=[Transaction(name, 0)]),
            post_commithook_properties=_KEEP_LOGS,
        )
        table = open_table(store, "annotations")
    rows = sum(file.rows for file in wanted.values())
    return TableVersion(delta_version=table.version(), files=len(wanted), rows=rows)


def write_row_groups(store: Store, version: int, files: Sequence[AnnotationFile]) -> tuple[str, str]:
    """Write the row-group index of a version; never over another one, which a record may name.

    Returns:
        Its path and SHA-256.
    """
    rows = [row for each in files for row in each.row_groups()]
    index = pa.Table.from_pylist(rows, schema=ROW_GROUPS)
    index = index.sort_by([("samples_path", "ascending"), ("row_group", "ascending")])
    data = encode_table(index, max(1, index.num_rows))
    digest, path = hashlib.sha256(data).hexdigest(), row_groups_path(version)
    if not (store.write_once(path, data) or store.read(path) == data):
        path = path.replace(".parquet", f".{digest[:16]}.parquet")
        store.write(path, data)
    return path, digest


def rewrite_name(kind: str, *settings: object) -> str:
    """The name of a rewrite: the same settings give the same files, so that a killed one is done again over itself."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return f"{kind}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"


def _check_file(store: Store, file: DataFile) -> None:
    try:
        found = store.size(f"annotations/{file.path}")
    except FileNotFoundError:
        found = -1
    if found != file.size:
        raise RunFailed(
            f"{store.uri}/annotations/{file.path} is not as it was written: something else writes here. "
            "Run the same command again"
        )


def _add_action(file: DataFile) -> AddAction:
    return AddAction(
        path=file.path,
        size=file.size,
        partition_values={},
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=json.dumps({"numRecords": file.rows}),
    )
