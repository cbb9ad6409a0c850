"""The formats of a table of links, each read as a stream of small tables: Parquet, CSV, TSV and JSON lines."""

import csv
import io
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coca.errors import BadInput
from pipelines.column_presets import Columns

BATCH_ROWS = 8192
MAX_LINE_BYTES = 16 << 20
_FIRST_RECORDS = 100


def read_parquet(
    source: pa.NativeFile, columns: Columns, path: str, row_groups: tuple[int, ...] | None = None
) -> Iterator[pa.Table]:
    """The text columns in their order and, where any column is carried along, their JSON objects as the last.

    A column chunk is read through a buffer: memory does not grow with the row group.

    Raises:
        BadInput: a column is missing or holds no text.
        pyarrow.ArrowInvalid, OSError: the file is damaged.
    """
    file = pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False)
    known = file.schema_arrow.names
    extra = columns.extra_of(known, path)
    chosen = list(dict.fromkeys([*columns.texts, *extra]))
    groups = range(file.num_row_groups) if row_groups is None else row_groups
    for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=list(groups), columns=chosen, use_threads=False):
        texts = [_as_text(batch.column(name), name, path) for name in columns.texts]
        yield _table(texts, encode_extra(batch.select(list(extra)).to_pylist()) if extra else None)


def read_csv(source: pa.NativeFile, columns: Columns, path: str, *, tabs: bool = False) -> Iterator[pa.Table]:
    """The same of delimited text. Every value is a text, an empty one too.

    Raises:
        BadInput: a column is missing, or a line is not UTF-8, ends inside quotes, or has more or fewer fields than the
            header; names the line.
    """
    csv.field_size_limit(MAX_LINE_BYTES)
    bare = tabs and bool(columns.header)
    quoting: Literal[0, 3] = csv.QUOTE_NONE if bare else csv.QUOTE_MINIMAL
    reader = csv.reader(_lines(source, path), delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    rows = _rows(reader, path)
    first = next(rows, [])
    header = list(columns.header) if bare else first
    if bare and first and first != header:
        rows = itertools.chain([first], rows)
    extra = columns.extra_of(header, path)
    places = [header.index(name) for name in columns.texts]
    extra_places = {name: header.index(name) for name in extra}
    for batch in _batches(_even(rows, len(header), reader, path)):
        texts = [pa.array([row[place] for row in batch], pa.string()) for place in places]
        objects = ({name: row[place] for name, place in extra_places.items()} for row in batch)
        yield _table(texts, encode_extra(objects) if extra else None)


def read_json_lines(source: pa.NativeFile, columns: Columns, path: str) -> Iterator[pa.Table]:
    """The same of one JSON object a line; a text column holds strings, numbers or nothing.

    Raises:
        BadInput: a line is no JSON object or holds something else in a text column (names the line), or none of the
            first 100 objects has a column.
    """
    records = _records(source, path)
    first = list(itertools.islice(records, _FIRST_RECORDS))
    known = list(dict.fromkeys(key for _, record in first for key in record))
    extra = columns.extra_of(known, path)
    everything = "*" in columns.extra
    for batch in _batches(itertools.chain(first, records)):
        texts = [
            pa.array([_json_text(record.get(name), name, path, line) for line, record in batch], pa.string())
            for name in columns.texts
        ]
        objects = (_carried(record, columns.texts) if everything else _chosen(record, extra) for _, record in batch)
        yield _table(texts, encode_extra(objects) if everything or extra else None)


def _carried(record: dict[str, Any], texts: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in texts}


def _chosen(record: dict[str, Any], extra: tuple[str, ...]) -> dict[str, Any]:
    return {key: record.get(key) for key in extra}


def encode_extra(objects: Iterable[dict[str, Any]]) -> pa.Array:
    """Rows of other columns as JSON objects with sorted keys; what is no number in JSON becomes null."""
    return pa.array([_clean(_encode(row)) for row in objects], pa.string())


def _table(texts: list[pa.Array], extra: pa.Array | None) -> pa.Table:
    arrays = texts if extra is None else [*texts, extra]
    return pa.Table.from_arrays(arrays, names=[str(place) for place in range(len(arrays))])


def _encode(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False, default=str)
    except ValueError:
        return json.dumps(_finite(row), sort_keys=True, ensure_ascii=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _clean(text: str) -> str:
    """Half surrogate pairs, which JSON can spell and UTF-8 cannot, become question marks."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _as_text(column: pa.Array, name: str, path: str) -> pa.Array:
    kind = column.type
    if pa.types.is_floating(kind):  # pandas writes a column of missing texts as NaN
        column = pc.if_else(pc.is_nan(column), None, column)
    elif pa.types.is_nested(kind):
        raise BadInput(f"{path}: column {name!r} holds {kind}, not text", "Name a column of texts")
    text = column.cast(pa.string())
    text.validate(full=True)  # Parquet promises UTF-8 and does not check it
    return text


def _lines(source: pa.NativeFile, path: str) -> Iterator[str]:
    buffered = io.BufferedReader(source, buffer_size=1 << 20)
    for number in itertools.count(1):
        line = buffered.readline(MAX_LINE_BYTES)
        if not line:
            return
        if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
            raise _bad_line(path, number, f"it is longer than {MAX_LINE_BYTES:,} bytes")
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise _bad_line(path, number, "it is not UTF-8") from None


def _bad_line(path: str, number: int, problem: str) -> BadInput:
    return BadInput(f"{path} line {number:,} cannot be read: {problem}", "Mend that line, and check the file is whole")


def _rows(reader: Any, path: str) -> Iterator[list[str]]:
    try:
        yield from (row for row in reader if row)
    except csv.Error as error:
        raise _bad_line(path, reader.line_num, str(error)) from None


def _even(rows: Iterable[list[str]], fields: int, reader: Any, path: str) -> Iterator[list[str]]:
    for row in rows:
        if len(row) != fields:
            raise _bad_line(path, reader.line_num, f"it has {len(row)} fields, the header {fields}")
        yield row


def _records(source: pa.NativeFile, path: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_lines(source, path), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_line(path, number, f"it is not JSON ({error})") from None
        if not isinstance(record, dict):
            raise _bad_line(path, number, f"it holds a {type(record).__name__}, not an object")
        yield number, record


def _json_text(value: Any, name: str, path: str, line: int) -> str | None:
    if isinstance(value, str):
        return _clean(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return json.dumps(value)
    raise _bad_line(path, line, f"{name!r} holds a {type(value).__name__}, not text")


def _batches(rows: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(rows)
    while batch := list(itertools.islice(iterator, BATCH_ROWS)):
        yield batch
