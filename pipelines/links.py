"""Reading a table of links: Parquet or CSV, one file, a folder or a pattern, on disk or S3."""

import difflib
import fnmatch
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from coca.errors import BadInput
from coca.storage import Store, open_file
from pipelines.links_config import LinksConfig

_SUFFIXES = (".parquet", ".pq", ".csv")


def read_links(config: LinksConfig) -> pa.Table:
    """The pairs as they stand in the files, files in the order of their names.

    Returns:
        Columns ``url`` and ``caption``, both string, null where the file holds null or NaN.

    Raises:
        BadInput: nothing to read there, an unknown column, a file that does not parse, or no row at all.
    """
    if not config.uri:
        raise BadInput("no links table is given", "Name one with --links URI")
    store, names = _find_files(config.uri)
    tables = [_read_file(store, name, config) for name in names]
    table = pa.concat_tables(tables)
    if table.num_rows == 0:
        raise BadInput(f"the links table {config.uri} has no rows", "Give one with at least one pair")
    return table


def _find_files(uri: str) -> tuple[Store, list[str]]:
    plain, wild = _split_pattern(uri)
    if wild:
        store = Store(plain)
        names = [name for name in _list_files(store) if _matches(name, wild)]
        missing = f"no file matches {uri}"
    else:
        store, name = open_file(uri)
        kind = store.filesystem.get_file_info(store.path(name)).type
        if kind == pafs.FileType.File:
            _check_suffix(uri, name)
            return store, [name]
        store = Store(uri)
        names = [name for name in _list_files(store) if name.endswith(_SUFFIXES)]
        missing = f"the links table {uri} does not exist"
        if kind == pafs.FileType.Directory:
            missing = f"the folder {uri} holds no {', '.join(_SUFFIXES)} file"
    if not names:
        raise BadInput(missing, "Give a Parquet or CSV file, a folder of them, or a pattern")
    for name in names:
        _check_suffix(uri, name)
    return store, names


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


def _list_files(store: Store) -> list[str]:
    """Files below a store, sorted, as paths relative to it; hidden ones left out."""
    selector = pafs.FileSelector(store.path(), recursive=True, allow_not_found=True)
    found = (info for info in store.filesystem.get_file_info(selector) if info.type == pafs.FileType.File)
    relative = (info.path[len(store.root.rstrip("/")) + 1 :] for info in found)
    return sorted(name for name in relative if not any(part.startswith((".", "_")) for part in name.split("/")))


def _check_suffix(uri: str, name: str) -> None:
    if not name.endswith(_SUFFIXES):
        raise BadInput(f"{uri}: {name} is neither Parquet nor CSV by its name", f"Name it {' or '.join(_SUFFIXES)}")


def _read_file(store: Store, name: str, config: LinksConfig) -> pa.Table:
    wanted = {"url": config.url_column, "caption": config.caption_column}
    read = _read_csv if name.endswith(".csv") else _read_parquet
    path = f"{store.uri}/{name}"
    try:
        with store.filesystem.open_input_file(store.path(name)) as source:
            table = read(source, lambda known: _check_columns(wanted.values(), known, path), list(wanted.values()))
        return pa.table({key: _as_text(table[column], column, path) for key, column in wanted.items()})
    except pa.ArrowInvalid as error:
        problem = str(error).splitlines()[0]
        raise BadInput(f"{path} cannot be read: {problem}", "Check that the file is whole and in UTF-8") from None


def _read_parquet(source: Any, check: Callable[[list[str]], None], columns: list[str]) -> pa.Table:
    file = pq.ParquetFile(source)
    check(file.schema_arrow.names)
    return file.read(columns=columns)


def _read_csv(source: Any, check: Callable[[list[str]], None], columns: list[str]) -> pa.Table:
    # A first, streamed look: naming a column that is not there would fail with less to say.
    if source.size() == 0:
        check([])
    check(pacsv.open_csv(source, parse_options=_CSV).schema.names)
    source.seek(0)
    convert = pacsv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
    return pacsv.read_csv(source, parse_options=_CSV, convert_options=convert)


_CSV = pacsv.ParseOptions(newlines_in_values=True)


def _check_columns(wanted: Any, known: list[str], path: str) -> None:
    for column in wanted:
        if column not in known:
            folded = {name.lower(): name for name in known}
            near = difflib.get_close_matches(column.lower(), folded, n=1, cutoff=0.0)
            hint = f"Did you mean {folded[near[0]]!r}? " if near else ""
            raise BadInput(
                f"{path} has no column {column!r}",
                f"{hint}It has {', '.join(known) or 'none'}; name yours with --url-column and --caption-column",
            )


def _as_text(column: pa.ChunkedArray, name: str, path: str) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_floating(kind):  # pandas writes a column of missing texts as NaN
        column = pc.if_else(pc.is_nan(column), None, column)
    elif pa.types.is_nested(kind):
        raise BadInput(f"{path}: column {name!r} holds {kind}, not text", "Name a column of texts")
    return column.cast(pa.string())
