"""A dataset version measured for ``coca data report``: every count, distribution and choice of rows on the page.

File by file, narrow columns only, into bins that are fixed in number: memory does not grow with the dataset. A
version of more than ``max_rows`` rows is measured on a fair choice of its files, and the survey says so.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.dataset import Dataset
from coca.progress import Progress
from pipelines.churn import Change, churn, compare
from pipelines.histogram import Histogram, Reservoir
from pipelines.rows import read_images, read_rows
from pipelines.survey_ledger import LedgerSurvey, survey_ledger
from pipelines.tables import open_table

MAX_ROWS = 5_000_000
MAX_EVENTS = 20_000_000
KEPT_PICTURES, REFUSED_PICTURES = 48, 8
# Sides from 16 to 16,384 pixels in half octaves; what lies outside counts in the outermost.
SIDE_EXPONENTS = np.linspace(4, 14, 21)
_SHOWN = ["sample_id", "url", "caption", "width", "height", "format", "language", "scores", "tokens", "reason"]
_FIELDS = {*_SHOWN, "fetched_at", "selected"}


@dataclass
class RowSurvey:
    """What the stored rows are like; distributions over the selected ones."""

    rows: int = 0
    """Looked at; withdrawn rows are none of them."""
    of_rows: int = 0
    """Of the version, from its row-group index."""
    files: int = 0
    of_files: int = 0
    selected: int = 0
    withdrawn: int = 0
    """Of the rows of the files that were read."""
    unselected: Counter[str] = field(default_factory=Counter)
    """Reason -> rows that are stored and not selected."""
    sides: np.ndarray = field(default_factory=lambda: np.zeros((20, 20), dtype=np.int64))
    """Stored pictures by (width, height), in the bins of ``SIDE_EXPONENTS``."""
    aspect: Histogram = field(default_factory=lambda: Histogram(-4, 4, log2=True))
    """Width over height."""
    words: Histogram = field(default_factory=lambda: Histogram(-0.5, 63.5))
    tokens: Histogram = field(default_factory=lambda: Histogram(-0.5, 63.5))
    image_bytes: Histogram = field(default_factory=lambda: Histogram(8, 24, log2=True))
    """Of the row groups that were opened for their pictures, not of all."""
    scores: dict[str, Histogram] = field(default_factory=dict)
    languages: Counter[str | None] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    days: Counter[str] = field(default_factory=Counter)
    """Day of the fetch (UTC) -> stored rows, selected or not."""
    kept: Reservoir = field(default_factory=lambda: Reservoir(KEPT_PICTURES))
    refused: dict[str, Reservoir] = field(default_factory=dict)

    @property
    def is_sample(self) -> bool:
        return self.files < self.of_files


@dataclass(frozen=True)
class Survey:
    """All that the page shows."""

    uri: str
    record: dict[str, Any]
    table_bytes: dict[str, int]
    """Table -> bytes of its files."""
    seed: int
    rows: RowSurvey
    ledger: LedgerSurvey
    churn: list[Change]
    pictures: dict[str, bytes]
    """Sample id -> stored bytes, of the rows in ``rows.kept`` and ``rows.refused``."""
    other: RowSurvey | None = None
    """The version to compare with."""
    against: Change | None = None


def survey(
    uri: str,
    version: int | None = None,
    against: int | None = None,
    *,
    seed: int = 0,
    max_rows: int = MAX_ROWS,
    max_events: int = MAX_EVENTS,
) -> Survey:
    """Measure a version.

    Args:
        against: another version, to compare with.

    Raises:
        BadInput: no such dataset or version, or a damaged one.
    """
    dataset = Dataset(uri, version)
    older = Dataset(uri, against) if against is not None else None
    rows = survey_rows(dataset, seed=seed, max_rows=max_rows)
    return Survey(
        uri=dataset.store.uri,
        record=dataset.record.model_dump(mode="json"),
        table_bytes=_table_bytes(dataset),
        seed=seed,
        rows=rows,
        ledger=survey_ledger(dataset, max_events=max_events, seed=seed),
        churn=churn(dataset),
        pictures=_read_pictures(dataset, rows),
        other=survey_rows(older, seed=seed, max_rows=max_rows) if older else None,
        against=compare(dataset, older) if older else None,
    )


def survey_rows(dataset: Dataset, *, seed: int, max_rows: int) -> RowSurvey:
    """Read the narrow columns of a version, or of files drawn by ``seed`` until ``max_rows`` rows are read."""
    groups, random = dataset.row_groups, np.random.default_rng(seed)
    paths = groups["samples_path"].unique().to_pylist()
    found = RowSurvey(of_rows=pc.sum(groups["rows"]).as_py() or 0, of_files=len(paths))
    chosen = _draw_files(groups, max_rows, random)
    found.files = len(chosen)
    places = np.flatnonzero(
        pc.is_in(groups["samples_path"], value_set=pa.array(sorted(chosen), pa.string())).to_numpy()
    )
    sizes = groups["rows"].to_numpy()
    with Progress("rows", total=int(sizes[places].sum()), unit="rows") as progress:
        for index in places.tolist():
            rows = read_rows(dataset, index, _FIELDS)
            found.withdrawn += int(sizes[index]) - rows.num_rows
            _add(found, rows, index, random)
            progress.advance(int(sizes[index]))
    return found


def _draw_files(groups: pa.Table, max_rows: int, random: np.random.Generator) -> set[str]:
    by_file = groups.group_by("samples_path", use_threads=False).aggregate([("rows", "sum")])
    order = random.permutation(by_file.num_rows)
    rows = np.cumsum(by_file["rows_sum"].to_numpy()[order])
    # The first file whatever it holds: a survey of nothing says nothing.
    wanted = max(1, int(np.searchsorted(rows, max_rows, side="right")))
    return set(by_file["samples_path"].take(pa.array(order[:wanted])).to_pylist())


def _add(found: RowSurvey, rows: pa.Table, index: int, random: np.random.Generator) -> None:
    found.rows += rows.num_rows
    days = pc.strftime(rows["fetched_at"], "%Y-%m-%d")
    found.days.update({row["values"]: row["counts"] for row in days.value_counts().to_pylist()})
    kept = rows.filter(rows["selected"])
    _add_selected(found, kept)
    found.kept.add(kept.select(_SHOWN), random, row_group=index)
    others = rows.filter(pc.invert(rows["selected"]))
    for reason in others["reason"].unique().to_pylist():
        named = reason or "no reason given"
        inside = others.filter(pc.equal(others["reason"], reason) if reason else others["reason"].is_null())
        found.unselected[named] += inside.num_rows
        found.refused.setdefault(named, Reservoir(REFUSED_PICTURES)).add(inside.select(_SHOWN), random, row_group=index)


def _add_selected(found: RowSurvey, kept: pa.Table) -> None:
    found.selected += kept.num_rows
    if kept.num_rows == 0:
        return
    width, height = kept["width"].to_numpy(), kept["height"].to_numpy()
    places = [np.searchsorted(SIDE_EXPONENTS, np.log2(np.maximum(side, 1)), "right") - 1 for side in (width, height)]
    np.add.at(found.sides, tuple(place.clip(0, len(SIDE_EXPONENTS) - 2) for place in places), 1)
    found.aspect.add(width / np.maximum(height, 1))
    # Whitespace is collapsed when a caption is judged.
    found.words.add(pc.add(pc.count_substring(kept["caption"], " "), 1).to_numpy())
    found.tokens.add(kept["tokens"].to_numpy())
    for column, counter in (("language", found.languages), ("format", found.formats)):
        for row in kept[column].value_counts().to_pylist():
            counter[row["values"]] += row["counts"]
    for name, values in _scores(kept["scores"]):
        if name not in found.scores:
            found.scores[name] = Histogram.fitting(values)
        found.scores[name].add(values)


def _scores(maps: pa.ChunkedArray) -> Iterator[tuple[str, np.ndarray]]:
    entries = maps.combine_chunks()
    entries = entries.filter(entries.is_valid())
    if len(entries) == 0:
        return
    flat = pa.table({"name": entries.keys, "value": entries.items})
    for name in sorted(flat["name"].unique().to_pylist()):
        values = flat["value"].filter(pc.equal(flat["name"], name)).drop_null()
        yield name, values.to_numpy().astype(np.float64)


def _read_pictures(dataset: Dataset, found: RowSurvey) -> dict[str, bytes]:
    chosen = [row for reservoir in (found.kept, *found.refused.values()) for row in reservoir.rows]
    wanted: dict[int, list[str]] = {}
    for row in chosen:
        wanted.setdefault(row["row_group"], []).append(row["sample_id"])
    pictures: dict[str, bytes] = {}
    for index, ids in sorted(wanted.items()):
        pictures |= read_images(dataset, index, ids, found.image_bytes)
    return pictures


def _table_bytes(dataset: Dataset) -> dict[str, int]:
    sizes = {}
    for name in ("samples", "annotations", "links"):
        version = getattr(dataset.record, name).delta_version
        actions = pa.table(open_table(dataset.store, name, version).get_add_actions(flatten=True))
        sizes[name] = pc.sum(actions["size_bytes"]).as_py() or 0
    return sizes
