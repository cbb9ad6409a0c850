"""Captions of links tables, streamed: Parquet, CSV or TSV, one file or a folder of them, on disk or S3."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv as pcsv
import pyarrow.dataset as ds
import pyarrow.fs as pafs

from coca.errors import BadInput
from coca.storage import Store

SUFFIXES = (".parquet", ".csv", ".tsv")
BATCH_ROWS = 8192


def read_column(uri: str, column: str) -> Iterator[list[str]]:
    """The texts of one column in batches, nulls left out; never more than a few batches in memory.

    Raises:
        BadInput: nothing at ``uri``, no table there, a column that is missing or holds no text, a damaged file.
    """
    store = Store(uri)
    paths = _table_files(store)
    try:
        table = ds.dataset(paths, filesystem=store.filesystem, format=_format(paths[0], column))
        _check_column(table.schema, column, uri)
        for batch in table.to_batches(columns=[column], batch_size=BATCH_ROWS, batch_readahead=2, fragment_readahead=1):
            yield batch.column(0).drop_null().to_pylist()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OSError) as error:
        raise BadInput(f"{uri} cannot be read: {' '.join(str(error).split())}", "Mend or leave out that file") from None


def _table_files(store: Store) -> list[str]:
    info = store.filesystem.get_file_info(store.path())
    if info.type == pafs.FileType.NotFound:
        raise BadInput(f"there is nothing at {store.uri}", "Give a .parquet, .csv or .tsv file, or a folder of them")
    names = [""] if info.type == pafs.FileType.File else store.list()
    paths = [store.path(name) for name in names]
    tables = [path for path in paths if path.endswith(SUFFIXES)]
    if not tables:
        raise BadInput(
            f"{store.uri} holds no {', '.join(SUFFIXES)} file", "Give a links table with a column of captions"
        )
    kinds = sorted({path.rpartition(".")[2] for path in tables})
    if len(kinds) > 1:
        raise BadInput(f"{store.uri} mixes {' and '.join(kinds)} files", "Give one kind at a time")
    return tables


def _format(path: str, column: str) -> Any:
    if path.endswith(".parquet"):
        return "parquet"
    return ds.CsvFileFormat(
        parse_options=pcsv.ParseOptions(delimiter="\t" if path.endswith(".tsv") else ",", newlines_in_values=True),
        # Without it a caption such as 2024 in the first block would make the column a number.
        convert_options=pcsv.ConvertOptions(column_types={column: pa.string()}),
    )


def _check_column(schema: pa.Schema, column: str, uri: str) -> None:
    if column not in schema.names:
        raise BadInput(f"{uri} has no column {column!r}", f"Give --column, one of: {', '.join(schema.names)}")
    kind = schema.field(column).type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise BadInput(f"column {column!r} of {uri} holds {kind}, not text", "Give --column with the captions")
