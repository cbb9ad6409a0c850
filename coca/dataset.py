"""Opening a published dataset: a version record, its row-group index, and rows by row group."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from coca.contract import ANNOTATIONS, READABLE_CONTRACTS, ROW_GROUPS, SAMPLES, VersionRecord, version_path
from coca.errors import BadInput
from coca.parquet_bytes import parse_parquet
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.withdrawn import Withdrawn, list_withdrawn, read_withdrawn

_SCHEMAS = {"samples": SAMPLES, "annotations": ANNOTATIONS}
_READ_THREADS = 16


def list_versions(store: Store) -> list[int]:
    """Published versions, ascending."""
    names = (name.removesuffix(".json") for name in store.list("versions") if name.endswith(".json"))
    return sorted(int(name) for name in names if name.isdecimal())


class Dataset:
    """One version of a dataset, read-only, without what has been withdrawn since.

    Travels to workers as its uri, its version number and the names of the withdrawn list's files, so that all of them
    see one list, also where it grows meanwhile.

    Raises:
        BadInput: no dataset there, no such version, or a record this code cannot read.
    """

    def __init__(self, uri: str, version: int | None = None, withdrawn_files: tuple[str, ...] | None = None) -> None:
        """
        Args:
            version: by default the latest.
            withdrawn_files: the part of the withdrawn list to apply; by default all that is there now.
        """
        self.store = Store(uri)
        versions = list_versions(self.store)
        if not versions:
            raise BadInput(
                f"{self.store.uri} holds no published dataset version",
                "Make one with `coca data refresh --links URI --to DATASET`",
            )
        wanted = versions[-1] if version is None else version
        if wanted not in versions:
            known = ", ".join(str(v) for v in versions[-8:])
            raise BadInput(f"{self.store.uri} has no version {wanted}", f"It has {known}")
        self.record = _read_record(self.store, wanted)
        self.withdrawn_files = list_withdrawn(self.store) if withdrawn_files is None else withdrawn_files

    def __reduce__(self) -> tuple[type["Dataset"], tuple[str, int, tuple[str, ...]]]:
        return type(self), (self.store.uri, self.record.version, self.withdrawn_files)

    def with_withdrawn(self, files: tuple[str, ...]) -> "Dataset":
        """The same version without what these files of the withdrawn list name, instead of its own."""
        return Dataset(self.store.uri, self.record.version, files)

    @cached_property
    def withdrawn(self) -> Withdrawn:
        """What is left out of this version, and of every other."""
        return read_withdrawn(self.store, self.withdrawn_files)

    @cached_property
    def row_groups(self) -> pa.Table:
        """The row-group index (contract.ROW_GROUPS), in the order of the samples files.

        ``selected`` counts what ``read_row_group`` gives: without withdrawn rows.
        """
        index = self.recorded_row_groups
        places = self.withdrawn.places_in(index).tolist()
        if not places:
            return index
        selected = index["selected"].to_numpy().copy()
        with ThreadPoolExecutor(_READ_THREADS) as pool:
            selected[places] = list(pool.map(self._count_selected, places))
        return index.set_column(ROW_GROUPS.get_field_index("selected"), ROW_GROUPS.field("selected"), [selected])

    @cached_property
    def recorded_row_groups(self) -> pa.Table:
        """The index as the version was published, withdrawn rows counted: what a writer goes on from."""
        data = self._read(self.record.row_groups_path)
        if hashlib.sha256(data).hexdigest() != self.record.row_groups_sha256:
            raise BadInput(
                f"{self.store.uri}/{self.record.row_groups_path} does not match its digest",
                "Restore the file",
            )
        return parse_parquet(data, ROW_GROUPS)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        stamp = self.record.tokenizer
        text = self._read(stamp.path).decode(errors="replace")
        tokenizer = Tokenizer.from_json(text, source=f"{self.store.uri}/{stamp.path}")
        if tokenizer.fingerprint != stamp.fingerprint:
            raise BadInput(
                f"{self.store.uri}/{stamp.path} has fingerprint {tokenizer.fingerprint}",
                f"The version record says {stamp.fingerprint}: restore the file",
            )
        return tokenizer

    def read_row_group(
        self,
        index: int,
        columns: tuple[str, ...] = ("sample_id", "image", "caption"),
        *,
        only_selected: bool = True,
    ) -> pa.Table:
        """Row group ``index`` of ``row_groups`` in stored order: the samples ``columns`` with ``tokens``.

        With ``only_selected=False`` also rows that are not selected, with ``selected`` and ``reason``. Withdrawn rows
        never come. A column that an older contract did not have is null.
        """
        group = self.row_groups.slice(index, 1).to_pylist()[0]
        where = f"{group['samples_path']} row group {group['row_group']}"
        samples = self._read_parquet("samples", group["samples_path"], group["row_group"], list(columns))
        wanted = ["sample_id", "tokens", "selected", "reason"]
        notes = self._read_parquet("annotations", group["annotations_path"], group["row_group"], wanted)
        if samples.num_rows != notes.num_rows:
            raise self._inconsistent(f"{where} has {samples.num_rows} rows, its annotations {notes.num_rows}")
        if "sample_id" in columns and not samples["sample_id"].equals(notes["sample_id"]):
            raise self._inconsistent(f"{group['samples_path']} and its annotations differ in order")
        kept = ~self.withdrawn.mask(notes["sample_id"])
        selected = kept & notes["selected"].to_numpy()
        if selected.sum() != group["selected"]:
            raise self._inconsistent(f"{where} has {selected.sum()} selected rows, the index says {group['selected']}")
        table = samples.append_column("tokens", notes["tokens"])
        if only_selected:
            # Most row groups need no copy of their pictures.
            return table if selected.all() else table.filter(selected)
        table = table.append_column("selected", notes["selected"]).append_column("reason", notes["reason"])
        return table if kept.all() else table.filter(kept)

    def _count_selected(self, index: int) -> int:
        """Selected rows of a row group that are not withdrawn."""
        group = self.recorded_row_groups.slice(index, 1).to_pylist()[0]
        columns = ["sample_id", "selected"]
        notes = self._read_parquet("annotations", group["annotations_path"], group["row_group"], columns)
        return int((notes["selected"].to_numpy() & ~self.withdrawn.mask(notes["sample_id"])).sum())

    def _read(self, path: str) -> bytes:
        try:
            return self.store.read(path)
        except FileNotFoundError:
            raise self._damaged(path, "is missing") from None

    def _read_parquet(self, table: str, name: str, row_group: int, columns: list[str]) -> pa.Table:
        path = f"{table}/{name}"
        try:
            rows = self._read_rows(path, row_group, columns)
        except FileNotFoundError:
            raise self._damaged(path, "is missing") from None
        except pa.ArrowInvalid as error:
            raise self._damaged(path, f"cannot be read: {error}") from None
        for column in columns:
            if column not in rows.schema.names:
                rows = rows.append_column(column, pa.nulls(rows.num_rows, _SCHEMAS[table].field(column).type))
        return rows.select(columns)

    def _read_rows(self, path: str, row_group: int, columns: list[str]) -> pa.Table:
        """Those of ``columns`` that the file has."""
        # Opened here, so that a `key=value` in the path is no column.
        with self.store.open(path) as source:
            file = pq.ParquetFile(source)
            there = [column for column in columns if column in file.schema_arrow.names]
            return file.read_row_group(row_group, columns=there)

    def _damaged(self, path: str, problem: str) -> BadInput:
        return BadInput(f"{self.store.uri}/{path} {problem}", "The dataset is damaged: restore the file")

    def _inconsistent(self, problem: str) -> BadInput:
        return BadInput(f"{self.store.uri}: {problem}", "The dataset is damaged: `coca data verify` names every fault")


def _read_record(store: Store, version: int) -> VersionRecord:
    path = version_path(version)
    try:
        values = json.loads(store.read(path))
        found = values.get("contract_version")
        if found not in READABLE_CONTRACTS:
            raise BadInput(
                f"{store.uri}/{path} follows contract version {found}, this code reads "
                f"{' and '.join(map(str, READABLE_CONTRACTS))}",
                "Use the release that wrote it",
            )
        return VersionRecord.model_validate(values)
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise BadInput(f"{store.uri}/{path} is not a version record: {first}", "Restore the file") from None
