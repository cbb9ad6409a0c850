"""Other tokens for the same captions: the annotations are written anew, samples and verdicts stay as they are."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import ANNOTATIONS, CONTRACT_VERSION, TokenizerStamp
from coca.dataset import Dataset
from coca.storage import Store
from coca.tokenizer import Tokenizer
from pipelines.annotations import (
    AnnotationFile,
    replace_annotations,
    rewrite_name,
    rewrite_parts,
    row_groups_of,
    write_annotations,
)
from pipelines.history import publish_next
from pipelines.lease import hold_lease
from pipelines.migrate import migrate_tables
from pipelines.row_group_index import write_row_groups
from pipelines.selection import IN_PROCESS_ROWS
from pipelines.stored_keys import StoredPart, stored_parts
from pipelines.tables import drop_foreign_files, read_data_files
from pipelines.tasks import StartRay


@dataclass(frozen=True)
class RetokenizeResult:
    """What a retokenization changed."""

    dataset: str
    version: int
    changed: bool
    """Whether a version was published; otherwise the dataset has this tokenizer's tokens already."""
    stored: int
    tokens_before: int
    """Over all stored captions, begin and end included."""
    tokens: int
    fingerprint: str
    seconds: float


def retokenize_dataset(
    uri: str, tokenizer: Tokenizer, *, start_ray: StartRay | None = None, in_process_rows: int = IN_PROCESS_ROWS
) -> RetokenizeResult:
    """Publish a version with the tokens of another tokenizer; ``selected``, reasons, languages and scores stay.

    Killed, the same call does it again over the same names.

    Raises:
        BadInput: no dataset, or it is being written.
        RunFailed: the lease is lost, or something else writes here.
    """
    started_s = time.monotonic()
    store = Dataset(uri).store
    with hold_lease(store, "coca data retokenize") as lease:
        dataset = Dataset(uri)
        record = dataset.record
        fingerprint = tokenizer.fingerprint
        if record.tokenizer.fingerprint == fingerprint:
            return RetokenizeResult(store.uri, record.version, False, record.samples.rows, 0, 0, fingerprint, 0.0)
        path = f"tokenizers/{fingerprint}.json"
        store.write_once(path, tokenizer.to_json().encode())
        name = rewrite_name("retokenize", record.version, fingerprint)
        write = partial(_rewrite_part, store, tokenizer, name, record.rows_per_row_group)
        start_many = start_ray if record.samples.rows > in_process_rows else None
        done = rewrite_parts(write, stored_parts(dataset), start_ray=start_many)
        files = [AnnotationFile.model_validate(each["file"]) for each in done]
        drop_foreign_files(store, "annotations", record.annotations.delta_version, name, lease=lease)
        migrate_tables(store, lease)
        annotations = replace_annotations(store, files, name, lease)
        index_path, digest = write_row_groups(store, record.version + 1, row_groups_of(files))
        published = publish_next(
            store,
            record,
            lease,
            kind="retokenize",
            parent=record.version,
            contract_version=CONTRACT_VERSION,
            refresh_id=name,
            annotations=annotations,
            selected=sum(sum(each.group_selected) for each in files),
            row_groups_path=index_path,
            row_groups_sha256=digest,
            tokenizer=TokenizerStamp(fingerprint=fingerprint, path=path, vocab_size=tokenizer.vocab_size),
        )
        return RetokenizeResult(
            dataset=store.uri,
            version=published.version,
            changed=True,
            stored=record.samples.rows,
            tokens_before=sum(each["before"] for each in done),
            tokens=sum(each["tokens"] for each in done),
            fingerprint=fingerprint,
            seconds=round(time.monotonic() - started_s, 3),
        )


def _rewrite_part(
    store: Store, tokenizer: Tokenizer, name: str, rows_per_row_group: int, part: StoredPart
) -> dict[str, Any]:
    notes = read_data_files(store, "annotations", [part.annotations_path])
    captions = read_data_files(store, "samples", [part.samples_path], ["caption"])["caption"].to_pylist()
    tokens = tokenizer.encode(captions)
    field = ANNOTATIONS.field("tokens")
    after = notes.set_column(notes.schema.get_field_index("tokens"), field, pa.array(tokens, field.type))
    path = f"{part.samples_path.removesuffix('.parquet')}-{name}.parquet"
    written = write_annotations(store, path, after, rows_per_row_group, samples_path=part.samples_path)
    before = pc.sum(pc.list_value_length(notes["tokens"])).as_py() or 0
    return {"file": written.model_dump(), "before": before, "tokens": sum(map(len, tokens))}
