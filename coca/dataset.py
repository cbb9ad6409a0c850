"""Opening a published dataset: a version record, its row-group index, and rows by row group."""

import hashlib
import io
import json
from functools import cached_property

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from coca.contract import READABLE_CONTRACTS, ROW_GROUPS, VersionRecord, version_path
from coca.errors import BadInput
from coca.storage import Store
from coca.tokenizer import Tokenizer


def list_versions(store: Store) -> list[int]:
    """Published versions, ascending."""
    names = (name.removesuffix(".json") for name in store.list("versions") if name.endswith(".json"))
    return sorted(int(name) for name in names if name.isdecimal())


class Dataset:
    """One version of a dataset, read-only. Travels to workers as its uri and version number.

    Raises:
        BadInput: no dataset there, no such version, or a record this code cannot read.
    """

    def __init__(self, uri: str, version: int | None = None) -> None:
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

    def __reduce__(self) -> tuple[type["Dataset"], tuple[str, int]]:
        return type(self), (self.store.uri, self.record.version)

    @cached_property
    def row_groups(self) -> pa.Table:
        """The row-group index (contract.ROW_GROUPS), in the order of the samples files."""
        data = self._read(self.record.row_groups_path)
        if hashlib.sha256(data).hexdigest() != self.record.row_groups_sha256:
            raise BadInput(
                f"{self.store.uri}/{self.record.row_groups_path} does not match its digest",
                "Restore the file",
            )
        return pq.read_table(io.BytesIO(data), schema=ROW_GROUPS)

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

        With ``only_selected=False`` all rows, with ``selected`` and ``reason``.
        """
        group = self.row_groups.slice(index, 1).to_pylist()[0]
        samples = self._read_parquet(f"samples/{group['samples_path']}", group["row_group"], list(columns))
        wanted = ["sample_id", "tokens", "selected", "reason"]
        notes = self._read_parquet(f"annotations/{group['annotations_path']}", group["row_group"], wanted)
        if samples.num_rows != notes.num_rows:
            raise BadInput(
                f"{group['samples_path']} row group {group['row_group']} has {samples.num_rows} rows,"
                f" its annotations {notes.num_rows}",
                "The dataset is damaged: restore it",
            )
        if "sample_id" in columns and not samples["sample_id"].equals(notes["sample_id"]):
            raise BadInput(
                f"{group['samples_path']} and its annotations differ in order",
                "The dataset is damaged: restore it",
            )
        table = samples.append_column("tokens", notes["tokens"])
        if only_selected:
            return table.filter(notes["selected"])
        return table.append_column("selected", notes["selected"]).append_column("reason", notes["reason"])

    def _read(self, path: str) -> bytes:
        try:
            return self.store.read(path)
        except FileNotFoundError:
            raise self._damaged(path, "is missing") from None

    def _read_parquet(self, path: str, row_group: int, columns: list[str]) -> pa.Table:
        try:
            # Opened here, so that a `key=value` in the path is no column.
            with self.store.filesystem.open_input_file(self.store.path(path)) as source:
                return pq.ParquetFile(source).read_row_group(row_group, columns=columns)
        except FileNotFoundError:
            raise self._damaged(path, "is missing") from None
        except pa.ArrowInvalid as error:
            raise self._damaged(path, f"cannot be read: {error}") from None

    def _damaged(self, path: str, problem: str) -> BadInput:
        return BadInput(f"{self.store.uri}/{path} {problem}", "The dataset is damaged: restore the file")


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
