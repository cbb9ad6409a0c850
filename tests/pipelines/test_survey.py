"""The survey behind the report: exact counts of a small world, fair samples of a large one, nothing withdrawn."""

from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest

from coca.dataset import Dataset
from coca.errors import BadInput
from coca.storage import Store
from coca.withdrawn import WITHDRAWN, append_withdrawn
from pipelines.churn import churn, compare
from pipelines.explain import explain
from pipelines.ledger import Ledger
from pipelines.survey import Survey, survey, survey_rows
from pipelines.survey_ledger import ADMITTED, NO_HOST, survey_ledger
from tests.seeing_fixtures import caption, events, key, picture, publish_world, url, withdraw


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return publish_world(tmp_path_factory.mktemp("survey") / "world")


@pytest.fixture(scope="module")
def measured(uri: str) -> Survey:
    return survey(uri, against=1)


def test_rows_are_counted_exactly(measured: Survey) -> None:
    rows = measured.rows
    assert (rows.rows, rows.of_rows, rows.files, rows.of_files, rows.is_sample) == (10, 10, 2, 2, False)
    assert (rows.selected, rows.withdrawn) == (7, 0)
    assert rows.unselected == {"duplicate_image": 1, "near_duplicate": 1, "score": 1}
    assert rows.languages == {"en": 4, "de": 2, None: 1}
    assert rows.formats == {"png": 7}
    assert rows.days == {f"2026-03-{day:02d}": 1 for day in range(1, 11)}


def test_distributions_are_of_the_selected_rows(measured: Survey) -> None:
    rows, kept = measured.rows, (0, 1, 2, 3, 4, 6, 9)
    assert rows.sides.sum() == 7
    assert rows.sides[4, 4] == 4  # 64 x 64: the fifth half octave from 16
    assert rows.sides[6, 4] == 2
    assert rows.sides[7, 4] == 1  # 192 lies between 181 and 256
    assert (rows.aspect.smallest, rows.aspect.largest, rows.aspect.count) == (1, 3, 7)
    words = Counter(len(caption(n).split()) for n in kept)
    assert {n: int(c) for n, c in enumerate(rows.words.counts) if c} == words
    assert {n: int(c) for n, c in enumerate(rows.tokens.counts) if c} == {n + 2: 1 for n in kept}
    assert rows.scores.keys() == {"clip"}
    assert (rows.scores["clip"].count, rows.scores["clip"].largest) == (6, pytest.approx(0.6))


def test_bytes_of_images_come_from_the_row_groups_that_were_opened(measured: Survey) -> None:
    sizes = [len(picture(n)) for n in (0, 1, 2, 3, 4, 6, 9)]
    histogram = measured.rows.image_bytes
    assert (histogram.count, histogram.total) == (7, sum(sizes))
    assert measured.pictures == {key(n): picture(n) for n in range(10)}


def test_the_ledger_counts_pairs_by_their_latest_event(measured: Survey) -> None:
    ledger = measured.ledger
    assert (ledger.pairs, ledger.events) == (15, 16)
    assert ledger.verdicts == {
        ("ok", None): 10,
        ("dead", "not_found"): 2,
        ("transient", "timeout"): 1,
        ("rejected", "invalid_url"): 1,
        ("blocked", "forbidden_address"): 1,
    }
    # Two dead links without a date are asked at once by the next refresh; of the slow pair only the later event counts.
    assert (ledger.due, ledger.due_later) == (2, 1)
    assert ledger.hosts == {
        "one.example": {ADMITTED: 4, "not_found": 2},
        "two.example": {ADMITTED: 4, "timeout": 1},
        "three.example": {ADMITTED: 2},
        "10.0.0.1": {"forbidden_address": 1},
        NO_HOST: {"invalid_url": 1},
    }
    assert [name for name, _ in ledger.largest_hosts(2)] == ["one.example", "two.example"]
    assert ledger.examples.keys() == {"not_found", "timeout", "invalid_url", "forbidden_address"}
    assert {row["url"] for row in ledger.examples["not_found"].rows} == {
        "http://one.example/gone",
        "http://one.example/gone2",
    }


def test_churn_follows_the_chain_of_records(uri: str) -> None:
    found = churn(Dataset(uri))
    told = [(c.version, c.parent, c.kind, c.added, c.removed, c.reselected, c.selected_change) for c in found]
    assert told == [
        (1, None, "refresh", 6, 0, 0, 5),
        (2, 1, "refresh", 4, 0, 0, 3),
        (3, 2, "select", 0, 0, 10, -1),
    ]
    assert [change.funnel_links for change in found] == [12, 12, None]
    assert len(churn(Dataset(uri), limit=2)) == 2
    back = compare(Dataset(uri, 1), Dataset(uri, 3))
    assert (back.added, back.removed, back.reselected, back.selected_change) == (0, 4, 6, -2)


def test_a_parent_that_is_gone_ends_the_chain(tmp_path: Path) -> None:
    uri = publish_world(tmp_path / "world")
    (tmp_path / "world/versions/1.json").unlink()
    assert [(change.version, change.parent) for change in churn(Dataset(uri))] == [(2, None), (3, 2)]


def test_another_version_is_measured_beside_it(measured: Survey) -> None:
    assert measured.other is not None
    assert (measured.other.rows, measured.other.selected) == (6, 5)
    assert measured.against is not None
    assert (measured.against.parent, measured.against.added, measured.against.selected) == (1, 4, 7)
    assert measured.table_bytes["samples"] > 2 * len(picture(0))


def test_the_same_seed_draws_the_same_pictures_and_another_draws_others(uri: str) -> None:
    def drawn(seed: int) -> list[str]:
        return [row["sample_id"] for row in survey_rows(Dataset(uri), seed=seed, max_rows=100).kept.rows]

    assert drawn(0) == drawn(0)
    assert len({tuple(drawn(seed)) for seed in range(5)}) > 1


def test_a_large_version_is_sampled_by_files_and_says_so(uri: str) -> None:
    chosen = {survey_rows(Dataset(uri), seed=seed, max_rows=6).rows for seed in range(20)}
    assert chosen == {4, 6}
    rows = survey_rows(Dataset(uri), seed=0, max_rows=1)
    assert rows.is_sample
    assert (rows.files, rows.of_files, rows.of_rows) == (1, 2, 10)


def test_a_large_ledger_is_sampled_by_buckets(uri: str) -> None:
    dataset = Dataset(uri)
    buckets = Ledger.of_version(dataset).paths
    assert buckets.keys() == {row["bucket"] for row in events()}
    found = survey_ledger(dataset, max_events=8, seed=0)
    assert found.of_buckets == len(buckets)
    assert found.buckets == len(buckets) * 8 // 16
    assert 0 < found.pairs < 15


def test_withdrawn_rows_are_counted_and_never_drawn(tmp_path: Path) -> None:
    uri = publish_world(tmp_path / "world")
    withdraw(uri, 1)
    withdraw(uri, 1)
    found = survey(uri)
    assert (found.rows.withdrawn, found.rows.rows, found.rows.selected) == (1, 9, 6)
    assert key(1) not in found.pictures
    assert found.rows.image_bytes.count == 6


def test_a_withdrawn_url_is_no_example_of_a_reason(tmp_path: Path) -> None:
    uri = publish_world(tmp_path / "world")
    values = {"url": "http://one.example/gone", "reason": "takedown", "withdrawn_at": datetime(2026, 1, 1, tzinfo=UTC)}
    append_withdrawn(Store(uri), pa.Table.from_pylist([values], schema=WITHDRAWN), "test")
    ledger = survey(uri).ledger
    assert [row["url"] for row in ledger.examples["not_found"].rows] == ["http://one.example/gone2"]
    assert ledger.verdicts["dead", "not_found"] == 2


def test_a_dataset_on_s3_is_seen_as_one_on_disk(s3: str, measured: Survey) -> None:
    uri = publish_world(f"{s3}/world")
    found = survey(uri, against=1)
    assert (found.rows.unselected, found.ledger.verdicts) == (measured.rows.unselected, measured.ledger.verdicts)
    assert (found.churn, found.pictures) == (measured.churn, measured.pictures)
    row = explain(Dataset(uri), url(5)).pairs[0]["row"]
    assert (row["row"], row["winner"]["url"]) == (1, url(2))


def test_a_missing_version_is_bad_input(uri: str) -> None:
    with pytest.raises(BadInput, match="has no version 9"):
        survey(uri, 9)
    with pytest.raises(BadInput, match="has no version 8"):
        survey(uri, against=8)
