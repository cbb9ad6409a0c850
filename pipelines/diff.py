"""What changed between two versions: samples, selection, ledger, settings. Files that both have are not read."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from coca.dataset import Dataset
from coca.storage import Store
from coca.typed_config import flatten
from pipelines.tables import open_table, read_data_files, table_files

_SAMPLE_NOTES = ["sample_id", "selected", "reason", "tokens"]
_EVENTS = ["sample_id", "state", "reason", "event_at"]


@dataclass
class VersionDiff:
    """From version ``before`` to version ``after``. Withdrawn samples count as published."""

    dataset: str
    before: int
    after: int
    added: Counter[str] = field(default_factory=Counter)
    """Samples stored in ``after`` only: "selected" or why not."""
    removed: Counter[str] = field(default_factory=Counter)
    """Samples stored in ``before`` only, likewise."""
    newly_selected: Counter[str] = field(default_factory=Counter)
    """In both, selected in ``after`` only: why not before."""
    unselected: Counter[str] = field(default_factory=Counter)
    """In both, selected in ``before`` only: why not after."""
    retokenized: int = 0
    """In both, with other tokens."""
    links: Counter[str] = field(default_factory=Counter)
    """Pairs of the ledger whose standing changed: "before -> after", "new" and "gone" for pairs in one only."""
    tokenizer: tuple[str, str] | None = None
    """Fingerprints, where they differ."""
    config: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Setting -> values, where they differ; None where a version does not have it."""


def diff(uri: str, before: int, after: int) -> VersionDiff:
    """Compare two versions, bucket by bucket and, where both have a samples file, file by file.

    Only ids of samples files that one version alone has are held in memory.

    Raises:
        BadInput: no dataset or no such version.
    """
    old, new = Dataset(uri, before), Dataset(uri, after)
    result = VersionDiff(old.store.uri, before, after)
    _diff_samples(old, new, result)
    _diff_links(old, new, result)
    stamps = old.record.tokenizer.fingerprint, new.record.tokenizer.fingerprint
    result.tokenizer = stamps if stamps[0] != stamps[1] else None
    settings = [flatten(dataset.record.config) for dataset in (old, new)]
    for name in sorted(settings[0].keys() | settings[1].keys()):
        values = settings[0].get(name), settings[1].get(name)
        if values[0] != values[1]:
            result.config[name] = values
    return result


def _diff_samples(old: Dataset, new: Dataset, result: VersionDiff) -> None:
    notes_of = [_annotations_of(dataset) for dataset in (old, new)]
    shared = notes_of[0].keys() & notes_of[1].keys()
    for path in sorted(shared):
        if notes_of[0][path] != notes_of[1][path]:
            tables = [
                _read_notes(dataset.store, [notes[path]]) for dataset, notes in zip((old, new), notes_of, strict=True)
            ]
            _compare_notes(tables[0], tables[1], result)
    only = [
        _read_notes(dataset.store, [notes[path] for path in sorted(notes.keys() - shared)])
        for dataset, notes in zip((old, new), notes_of, strict=True)
    ]
    # The same sample may lie in other files: a dataset that was written anew.
    moved = [
        side.filter(pc.is_in(side["sample_id"], value_set=other["sample_id"].combine_chunks()))
        for side, other in (only, only[::-1])
    ]
    _compare_notes(moved[0].sort_by("sample_id"), moved[1].sort_by("sample_id"), result)
    for side, other, counts in ((only[0], only[1], result.removed), (only[1], only[0], result.added)):
        alone = side.filter(pc.invert(pc.is_in(side["sample_id"], value_set=other["sample_id"].combine_chunks())))
        counts.update(_verdicts(alone))


def _annotations_of(dataset: Dataset) -> dict[str, str]:
    index = dataset.recorded_row_groups
    return dict(zip(index["samples_path"].to_pylist(), index["annotations_path"].to_pylist(), strict=True))


def _read_notes(store: Store, paths: Iterable[str]) -> pa.Table:
    return read_data_files(store, "annotations", list(paths), _SAMPLE_NOTES)


def _compare_notes(old: pa.Table, new: pa.Table, result: VersionDiff) -> None:
    """Count differences of tables with the same samples in the same order."""
    before, after = old["selected"], new["selected"]
    result.newly_selected.update(_verdicts(old.filter(pc.and_(after, pc.invert(before)))))
    result.unselected.update(_verdicts(new.filter(pc.and_(before, pc.invert(after)))))
    result.retokenized += sum(a != b for a, b in zip(old["tokens"].to_pylist(), new["tokens"].to_pylist(), strict=True))


def _verdicts(notes: pa.Table) -> Counter[str]:
    names = pc.if_else(notes["selected"], "selected", pc.fill_null(notes["reason"], "no reason"))
    return _count(names)


def _diff_links(old: Dataset, new: Dataset, result: VersionDiff) -> None:
    files = [_files_by_bucket(dataset) for dataset in (old, new)]
    for bucket in sorted(files[0].keys() | files[1].keys()):
        paths = [side.get(bucket, frozenset()) for side in files]
        if paths[0] != paths[1]:
            standing = [_standing(dataset.store, sorted(side)) for dataset, side in zip((old, new), paths, strict=True)]
            joined = standing[0].join(standing[1], keys="sample_id", join_type="full outer", right_suffix="_after")
            before, after = pc.fill_null(joined["verdict"], "new"), pc.fill_null(joined["verdict_after"], "gone")
            changed = pc.not_equal(before, after)
            result.links.update(_count(pc.binary_join_element_wise(before, after, " -> ").filter(changed)))


def _files_by_bucket(dataset: Dataset) -> dict[str, frozenset[str]]:
    buckets: dict[str, set[str]] = {}
    for path in table_files(open_table(dataset.store, "links", dataset.record.links.delta_version)):
        buckets.setdefault(path.partition("/")[0], set()).add(path)
    return {bucket: frozenset(paths) for bucket, paths in buckets.items()}


def _standing(store: Store, paths: list[str]) -> pa.Table:
    """sample_id and the verdict of its latest event."""
    events = read_data_files(store, "links", paths, _EVENTS)
    verdict = pc.if_else(pc.is_null(events["reason"]), events["state"], events["reason"])
    events = events.append_column("verdict", verdict).sort_by([("sample_id", "ascending"), ("event_at", "ascending")])
    latest = events.group_by("sample_id", use_threads=False).aggregate([("verdict", "last")])
    return latest.rename_columns({"verdict_last": "verdict"}).select(["sample_id", "verdict"])


def _count(names: pa.ChunkedArray) -> Counter[str]:
    return Counter({row["values"]: row["counts"] for row in pc.value_counts(names).to_pylist()})
