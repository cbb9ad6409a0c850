"""The rows of a dataset version as people look at them: narrow columns of both tables side by side, then pictures."""

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coca.contract import ANNOTATIONS, SAMPLES
from coca.dataset import Dataset
from coca.errors import BadInput
from pipelines.histogram import Histogram

if TYPE_CHECKING:
    from pipelines.where import Where

SCORE_PREFIX = "scores."
_SAMPLE_FIELDS = {field.name: field.type for field in SAMPLES if field.name != "image"}
_NOTE_FIELDS = {field.name: field.type for field in ANNOTATIONS if field.name not in ("sample_id", "tokens", "scores")}
# What can be named and shown; beside these ``scores.NAME`` for each scorer.
FIELDS: dict[str, pa.DataType] = {**_SAMPLE_FIELDS, "host": pa.string(), **_NOTE_FIELDS, "tokens": pa.int32()}

# Canonical urls have a lower-case host; an IPv6 address stands in brackets.
_HOST = r"^https?://(?P<host>\[[^\]]*\]|[^/:?#]*)"


def hosts_of(urls: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """The host of each canonical url, null where there is none."""
    return pc.struct_field(pc.extract_regex(urls, _HOST), "host")


def read_rows(dataset: Dataset, index: int, fields: Collection[str]) -> pa.Table:
    """``fields`` (``FIELDS``, ``scores`` or ``scores.NAME``) of row group ``index``, withdrawn rows left out.

    Returns:
        A table with ``sample_id`` and the fields, rows in stored order. ``tokens`` is their number.
    """
    wanted = set(fields) | {"sample_id"}
    scored = any(name == "scores" or name.startswith(SCORE_PREFIX) for name in wanted)
    columns = tuple(sorted((wanted & _SAMPLE_FIELDS.keys()) | ({"url"} if "host" in wanted else set())))
    table = dataset.read_row_group(index, columns=columns, only_selected=False)
    if "host" in wanted:
        table = table.append_column("host", hosts_of(table["url"]))
    further: list[str] = [name for name in ("language", "scores") if name in wanted or (name == "scores" and scored)]
    if further:
        notes = read_annotations(dataset, index, ["sample_id", *further])
        # By key: withdrawn rows are gone from one and not from the other.
        notes = notes.take(pc.index_in(table["sample_id"], value_set=notes["sample_id"].combine_chunks()))
        for column in further:
            table = table.append_column(column, notes[column])
    for name in wanted:
        if name.startswith(SCORE_PREFIX):
            score = pc.map_lookup(table["scores"], pa.scalar(name.removeprefix(SCORE_PREFIX)), "first")
            table = table.append_column(name, score)
    counts = pc.list_value_length(table["tokens"])
    table = table.set_column(table.schema.get_field_index("tokens"), "tokens", counts)
    return table.select(["sample_id", *sorted(wanted - {"sample_id"})])


def find_rows(
    dataset: Dataset, fields: Collection[str], limit: int, *, where: "Where | None", selected: bool | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The first ``limit`` rows that match, each with the index of its row group.

    Args:
        selected: only rows that are part of the training data, or only the others; ``None`` for both.
    """
    named = where.columns if where else frozenset()
    for index, group in enumerate(dataset.row_groups.to_pylist()):
        if limit <= 0:
            return
        if selected is not None and group["rows"] - group["selected"] == (group["rows"] if selected else 0):
            continue  # nothing of the wanted kind: not worth opening
        rows = read_rows(dataset, index, {*named, "selected"})
        if selected is not None:
            rows = rows.filter(pc.field("selected") == selected)
        if where is not None:
            rows = rows.filter(where.expression)
        ids = rows["sample_id"].slice(0, limit).combine_chunks()
        if len(ids) == 0:
            continue
        shown = read_rows(dataset, index, fields).filter(pc.field("sample_id").isin(ids))
        limit -= shown.num_rows
        for row in shown.to_pylist():
            yield index, row


def read_images(
    dataset: Dataset, index: int, sample_ids: Collection[str], sizes: Histogram | None = None
) -> dict[str, bytes]:
    """The stored bytes of some rows of a row group, by sample id; none of a withdrawn row.

    Args:
        sizes: counts the bytes of every selected picture of the row group: Parquet reads them all anyway.
    """
    table = dataset.read_row_group(index, columns=("sample_id", "image"), only_selected=False)
    if sizes is not None:
        sizes.add(pc.binary_length(table["image"].filter(table["selected"])).to_numpy())
    chosen = table.filter(pc.field("sample_id").isin(pa.array(list(sample_ids), pa.string())))
    return dict(zip(chosen["sample_id"].to_pylist(), chosen["image"].to_pylist(), strict=True))


def read_annotations(dataset: Dataset, index: int, columns: list[str]) -> pa.Table:
    """Columns of the annotations of row group ``index``, of every row, withdrawn or not."""
    group = dataset.row_groups.slice(index, 1).to_pylist()[0]
    path = f"annotations/{group['annotations_path']}"
    try:
        with dataset.store.filesystem.open_input_file(dataset.store.path(path)) as source:
            file = pq.ParquetFile(source)
            present = [name for name in columns if name in file.schema_arrow.names]
            table = file.read_row_group(group["row_group"], columns=present)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        raise BadInput(
            f"{dataset.store.uri}/{path} cannot be read: {error}", "The dataset is damaged: restore the file"
        ) from None
    for name in columns:  # contract 1 has no scores
        if name not in present:
            table = table.append_column(name, pa.nulls(table.num_rows, ANNOTATIONS.field(name).type))
    return table
