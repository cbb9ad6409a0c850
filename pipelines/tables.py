"""The three Delta tables: creating them, committing files already written, and reading a snapshot's files."""

import time
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
from deltalake import CommitProperties, DeltaTable, PostCommitHookProperties, Transaction
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.transaction import AddAction
from pydantic import BaseModel, ConfigDict

from coca.contract import ANNOTATIONS, LINKS, SAMPLES
from coca.errors import RunFailed
from coca.storage import Store
from pipelines.lease import Lease

SCHEMAS = {"samples": SAMPLES, "annotations": ANNOTATIONS, "links": LINKS}
_PARTITION_BY = {"links": ["bucket"]}
# Expired log entries would take away the Delta versions that older version records name.
_KEEP_LOGS = PostCommitHookProperties(create_checkpoint=True, cleanup_expired_logs=False)


class DataFile(BaseModel):
    """A file that lies in a table's folder and waits for, or belongs to, a commit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    """Relative to the table."""
    size: int
    rows: int
    bucket: str | None = None


def open_table(store: Store, name: str, version: int | None = None) -> DeltaTable:
    """A fresh handle: an old one does not see the commits of others.

    Raises:
        TableNotFoundError: there is no such table.
    """
    table = store.retry(lambda: _open(store, name, version), DeltaError)
    if table is None:
        raise TableNotFoundError(f"no table at {store.delta_uri(name)}")
    return table


def _open(store: Store, name: str, version: int | None) -> DeltaTable | None:
    try:
        return DeltaTable(store.delta_uri(name), version=version, storage_options=store.delta_options or None)
    except TableNotFoundError:
        return None


def create_tables(store: Store) -> None:
    """Create the tables that are not there; their version 0 is empty."""
    for name in SCHEMAS:
        try:
            open_table(store, name)
        except TableNotFoundError:
            store.retry(partial(_create, store, name), DeltaError)


def _create(store: Store, name: str) -> None:
    DeltaTable.create(
        store.delta_uri(name),
        SCHEMAS[name],
        mode="ignore",
        partition_by=_PARTITION_BY.get(name),
        storage_options=store.delta_options or None,
    )


def table_files(table: DeltaTable) -> dict[str, int]:
    """path -> rows of the files of a snapshot."""
    return {path: rows for path, (_, rows) in file_sizes(table).items()}


def file_sizes(table: DeltaTable) -> dict[str, tuple[int, int]]:
    """path -> (bytes, rows) of the files of a snapshot, as its log has them."""
    # What the log holds of files is read when it is asked for.
    actions = Store(table.table_uri).retry(lambda: pa.table(table.get_add_actions(flatten=True)), DeltaError)
    sizes = zip(actions["size_bytes"].to_pylist(), actions["num_records"].to_pylist(), strict=True)
    return dict(zip(actions["path"].to_pylist(), sizes, strict=True))


def lying_files(store: Store, name: str) -> dict[str, int]:
    """path -> bytes of the data files that lie in a table's folder, whether or not a version has them."""
    selector = pafs.FileSelector(store.path(name), recursive=True, allow_not_found=True)
    start = len(store.path(name)) + 1
    found = {info.path[start:]: info.size for info in store.filesystem.get_file_info(selector) if info.is_file}
    return {path: size for path, size in found.items() if path.endswith(".parquet") and not path.startswith("_")}


def commit_files(
    store: Store, name: str, files: list[DataFile], refresh_id: str, batch: int, *, lease: Lease | None = None
) -> None:
    """Append files to a table, once: the application transaction (refresh id, batch) tells whether it was done.

    Raises:
        RunFailed: a file is not there with its size (Delta itself would take the commit), or ``lease`` is lost.
    """
    # Where the answer to a commit is lost, Delta calls it failed, or in conflict with itself: looking again tells.
    store.retry(lambda: _commit_files(store, name, files, (refresh_id, batch), lease), DeltaError)


def _commit_files(
    store: Store, name: str, files: list[DataFile], transaction: tuple[str, int], lease: Lease | None
) -> None:
    refresh_id, batch = transaction
    table = open_table(store, name)
    committed = table.transaction_version(refresh_id)
    if committed is not None and committed >= batch and {file.path for file in files} <= table_files(table).keys():
        return
    for file in files:
        _check_file(store, f"{name}/{file.path}", file.size)
    if lease is not None:
        lease.check()
    table.create_write_transaction(
        actions=[_add_action(file) for file in files],
        mode="append",
        schema=SCHEMAS[name],
        partition_by=_PARTITION_BY.get(name),
        commit_properties=CommitProperties(app_transactions=[Transaction(refresh_id, batch)]),
        post_commithook_properties=_KEEP_LOGS,
    )


def replace_files(store: Store, name: str, files: list[DataFile], rewrite: str, lease: Lease) -> None:
    """Put files in the place of all files of a table, once: the application transaction ``rewrite`` tells.

    Raises:
        RunFailed: a file is not there with its size, or ``lease`` is lost.
    """
    store.retry(lambda: _replace_files(store, name, files, rewrite, lease), DeltaError)


def _replace_files(store: Store, name: str, files: list[DataFile], rewrite: str, lease: Lease) -> None:
    table = open_table(store, name)
    if table.transaction_version(rewrite) is not None and table_files(table).keys() == {file.path for file in files}:
        return
    for file in files:
        _check_file(store, f"{name}/{file.path}", file.size)
    lease.check()
    table.create_write_transaction(
        actions=[_add_action(file) for file in files],
        mode="overwrite",
        schema=SCHEMAS[name],
        partition_by=_PARTITION_BY.get(name),
        commit_properties=CommitProperties(app_transactions=[Transaction(rewrite, 0)]),
        post_commithook_properties=_KEEP_LOGS,
    )


def replace_bucket(store: Store, file: DataFile, lease: Lease) -> None:
    """Put one file in the place of all files of its bucket of the ledger.

    Raises:
        RunFailed: the file is not there with its size, or ``lease`` is lost.
    """
    _check_file(store, f"links/{file.path}", file.size)
    store.retry(lambda: _replace_bucket(store, file, lease), DeltaError)


def _replace_bucket(store: Store, file: DataFile, lease: Lease) -> None:
    assert file.bucket is not None
    table = open_table(store, "links")
    if file.path in table_files(table):  # the answer to it was lost
        return
    lease.check()
    table.create_write_transaction(
        actions=[_add_action(file)],
        mode="overwrite",
        schema=SCHEMAS["links"],
        partition_by=_PARTITION_BY["links"],
        partition_filters=[("bucket", "=", file.bucket)],
        post_commithook_properties=_KEEP_LOGS,
    )


def drop_foreign_files(
    store: Store, name: str, published: int, refresh_id: str | tuple[str, ...], *, lease: Lease | None = None
) -> None:
    """Take a table back to its ``published`` Delta version where a refresh that never finished has added to it.

    What this refresh itself added (or one of several) goes with it and is committed again from its staged manifests.
    """
    store.retry(lambda: _drop_foreign_files(store, name, published, refresh_id, lease), DeltaError)


def _drop_foreign_files(
    store: Store, name: str, published: int, refresh_id: str | tuple[str, ...], lease: Lease | None
) -> None:
    table = open_table(store, name)
    if table.version() == published:
        return
    base = table_files(open_table(store, name, published)).keys()
    current = table_files(table).keys()
    foreign = {path for path in current - base if not path.rpartition("/")[2].startswith(refresh_id)}
    if foreign or base - current:
        if lease is not None:
            lease.check()
        table.restore(published)


def read_data_files(
    store: Store, name: str, paths: list[str], columns: list[str] | None = None, where: pc.Expression | None = None
) -> pa.Table:
    """Columns of some files of a table, of all rows or those that match; what an older contract lacks is null."""
    stored = file_schema(name)
    if not paths:
        return stored.empty_table().select(columns or stored.names)
    full_paths = [store.path(f"{name}/{path}") for path in paths]

    def read() -> pa.Table:
        files = pads.dataset(
            full_paths, schema=stored, format="parquet", filesystem=store.filesystem, partitioning=None
        )
        return files.to_table(columns=columns, filter=where)

    return store.retry(read, pa.ArrowInvalid)


def file_schema(name: str) -> pa.Schema:
    """The columns of a table's files: all but the one it is partitioned by, whose value is in the path."""
    return pa.schema([field for field in SCHEMAS[name] if field.name not in _PARTITION_BY.get(name, [])])


def _check_file(store: Store, path: str, size: int) -> None:
    try:
        found = store.size(path)
    except FileNotFoundError:
        raise RunFailed(f"{store.uri}/{path} is gone before its commit; run the same command again") from None
    if found != size:
        raise RunFailed(f"{store.uri}/{path} has {found:,} bytes, {size:,} were written: something else writes here")


def _add_action(file: DataFile) -> AddAction:
    return AddAction(
        path=file.path,
        size=file.size,
        partition_values={"bucket": file.bucket} if file.bucket else {},
        modification_time=int(time.time() * 1000),
        data_change=True,
        stats=f'{{"numRecords": {file.rows}}}',
    )
