"""Reading a table of links: pieces that workers read on their own, each as a stream of (url, caption, extra)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from coca.errors import BadInput
from pipelines.column_presets import PRESETS, Columns, resolve_columns
from pipelines.link_files import LinkFile, find_files, is_web, kind_of, open_table
from pipelines.link_formats import read_csv, read_json_lines, read_parquet
from pipelines.links_config import LinksConfig, PresetName

LINKS_TABLE = pa.schema([("url", pa.string()), ("caption", pa.string()), ("extra", pa.string())])
PIECE_ROWS = 1_000_000
_LISTING_THREADS = 8


@dataclass(frozen=True)
class LinksPiece:
    """What one worker reads: a stretch of row groups of a Parquet file, or a whole file of text or from the web."""

    uri: str
    row_groups: tuple[int, ...] | None
    rows: int | None
    """Known of Parquet only."""
    fingerprint: str
    """Size and time of the file, or what its server says instead: changes when the content does."""
    size: int | None = None
    """Bytes of the whole file, where a listing tells."""


def list_pieces(config: LinksConfig) -> list[LinksPiece]:
    """The pieces of a table, files in the order of their names. Reads footers and first lines, never a whole file.

    Raises:
        BadInput: no table there, an unknown column, a file that cannot be read, or no row at all. What is fetched by
            https is only asked whether it is there.
    """
    if not config.uri:
        raise BadInput("no links table is given", "Name one with --links URI")
    pieces, empty = _list_pieces(config.uri, resolve_columns(config), config)
    if empty:
        raise _no_rows(config.uri)
    return pieces


def read_piece(piece: LinksPiece, config: LinksConfig) -> Iterator[pa.Table]:
    """The rows of a piece in their order as ``LINKS_TABLE``, at most 8,192 at a time; memory does not grow with them.

    Null where a file holds null or NaN. ``extra`` is a JSON object with sorted keys, null where no column is carried.

    Raises:
        BadInput: the file cannot be read, or breaks its format (names the line).
    """
    for table in _read_piece(piece, resolve_columns(config), config):
        if table.num_columns == 2:
            table = table.append_column("extra", pa.nulls(table.num_rows, pa.string()))
        yield table.rename_columns(LINKS_TABLE.names)


def read_links(config: LinksConfig) -> pa.Table:
    """All pairs of a table as ``LINKS_TABLE``, for tables that fit into memory.

    Raises:
        BadInput: as ``list_pieces`` and ``read_piece``, or no row at all.
    """
    tables = [table for piece in list_pieces(config) for table in read_piece(piece, config)]
    if not tables:
        raise _no_rows(config.uri)
    return pa.concat_tables(tables)


def read_texts(uri: str, column: str, preset: PresetName = "") -> Iterator[pa.Array]:
    """One column of a table, at most 8,192 texts at a time.

    Raises:
        BadInput: as ``list_pieces`` and ``read_piece``.
    """
    columns = Columns((column,), header=PRESETS[preset].header, way_out="name yours with --column")
    config = LinksConfig(uri=uri)
    for piece in _list_pieces(uri, columns, config)[0]:
        for table in _read_piece(piece, columns, config):
            yield table.column(0).combine_chunks()


def _list_pieces(uri: str, columns: Columns, config: LinksConfig) -> tuple[list[LinksPiece], bool]:
    """The pieces, and whether it is known that they hold no row."""
    with ThreadPoolExecutor(_LISTING_THREADS) as threads:
        listed = list(threads.map(lambda file: _pieces_of(file, columns, config), find_files(uri)))
    return [piece for pieces, _ in listed for piece in pieces], all(empty for _, empty in listed)


def _pieces_of(file: LinkFile, columns: Columns, config: LinksConfig) -> tuple[list[LinksPiece], bool]:
    whole = LinksPiece(file.uri, None, None, file.fingerprint, file.size)
    if is_web(file.uri):
        return [whole], False
    if kind_of(file.uri) != "parquet":
        return [whole], next(_read_piece(whole, columns, config), None) is None
    with _readable(file.uri), open_table(file.uri, config.max_download_bytes) as source:
        footer = pq.ParquetFile(source)
        columns.extra_of(footer.schema_arrow.names, file.uri)
        rows = [footer.metadata.row_group(index).num_rows for index in range(footer.num_row_groups)]
    stretches = _stretches(rows)
    return [LinksPiece(file.uri, groups, n, file.fingerprint, file.size) for groups, n in stretches], not sum(rows)


def _stretches(rows: list[int]) -> list[tuple[tuple[int, ...], int]]:
    """Neighbouring row groups together as long as they have at most ``PIECE_ROWS`` rows; empty ones left out."""
    stretches: list[tuple[tuple[int, ...], int]] = []
    for index, count in enumerate(rows):
        if not count:
            continue
        if stretches and stretches[-1][1] + count <= PIECE_ROWS:
            groups, before = stretches[-1]
            stretches[-1] = ((*groups, index), before + count)
        else:
            stretches.append(((index,), count))
    return stretches


def _read_piece(piece: LinksPiece, columns: Columns, config: LinksConfig) -> Iterator[pa.Table]:
    shown = LinkFile(piece.uri, "").shown
    with _readable(shown), open_table(piece.uri, config.max_download_bytes) as source:
        kind = kind_of(piece.uri)
        if kind == "parquet":
            yield from read_parquet(source, columns, shown, piece.row_groups)
        elif kind == "jsonl":
            yield from read_json_lines(source, columns, shown)
        else:
            yield from read_csv(source, columns, shown, tabs=kind == "tsv")


@contextmanager
def _readable(shown: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError) as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{shown} cannot be read: {problem}", "Check that the file is whole and in UTF-8") from None


def _no_rows(uri: str) -> BadInput:
    return BadInput(f"the links table {uri} has no rows", "Give one with at least one pair")
