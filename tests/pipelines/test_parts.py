"""What a part leaves, how many parts are under way at once, and how many workers fetch."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coca.contract import SAMPLES, Reason, State
from coca.errors import BadInput, RunFailed
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.withdrawn import WITHDRAWN, Withdrawn
from pipelines import part_files
from pipelines.config import PublishConfig, RefreshConfig
from pipelines.intake import LinksTable, take_in
from pipelines.join import JoinSettings, find_due
from pipelines.ledger import EVENTS, latest_events
from pipelines.outcomes import OUTCOMES
from pipelines.parts import FetchJob, FetchPart, read_report, run_parts
from pipelines.plan import PlannedBatch, cut_batch
from pipelines.staging import Staging

Build = Callable[..., RefreshConfig]


@pytest.fixture
def fetch_all(tokenizer_file: Path) -> Callable[..., Iterator[dict[str, Any]]]:
    """``fetch_all(config)``: all links of a config as parts, without Ray; the reports."""

    def run(config: RefreshConfig, *, withdrawn: pa.Table | None = None, links_per_part: int = 100) -> Any:
        from datetime import UTC, datetime

        staging = Staging(Store(config.to), "refresh")
        rows = take_in(staging.dataset, LinksTable.open(config.links), config).read_shard(0)
        settings = JoinSettings(datetime(2026, 1, 1, tzinfo=UTC), 0, 1000, 0, config.recheck)
        due, _ = find_due(rows, latest_events(EVENTS.empty_table()), settings)
        staging.write_table("due.parquet", due)
        publish = PublishConfig(links_per_part=links_per_part, rows_per_row_group=4)
        cut = cut_batch(staging, 3, PlannedBatch(files=["due.parquet"], urls=due.num_rows, rows=due.num_rows), publish)
        gone = Withdrawn(WITHDRAWN.empty_table() if withdrawn is None else withdrawn)
        job = FetchJob(config.model_copy(update={"publish": publish}), staging, Tokenizer.load(tokenizer_file), gone)
        worker = FetchPart(job)
        try:
            return staging, [read_report(worker({"batch": 3, "part": part})) for part in range(len(cut.urls))]
        finally:
            worker.close()

    return run


def outcomes_of(staging: Staging, part: int = 0) -> list[dict[str, Any]]:
    return staging.read_table(staging.outcome_path(3, part), OUTCOMES).to_pylist()


def test_the_captions_of_a_url_share_one_request(
    web: Any, pages: Any, refresh_config: Build, tokenizer_file: Path, fetch_all: Any
) -> None:
    web.pages["/a"] = pages.image("a")
    config = refresh_config([("/a", f"caption {number}") for number in range(5)] + [("/gone", "dead link")])
    staging, [report] = fetch_all(config)
    assert web.requests == {"/a": 1, "/gone": 1}
    assert (report.urls, report.requests, report.bytes) == (2, 2, len(pages.picture("a")))
    outcomes = outcomes_of(staging)
    assert [o["attempts"] for o in outcomes] == [1] * 6
    assert sum(o["requests"] for o in outcomes) == 2
    tokenizer = Tokenizer.load(tokenizer_file)
    assert {o["caption"]: o["tokens"] for o in outcomes if o["admitted"]} == {
        f"caption {n}": tokenizer.encode([f"caption {n}"])[0] for n in range(5)
    }
    path = staging.dataset.path(staging.samples_path(3, 0))
    samples = pq.read_table(path, schema=SAMPLES)
    assert samples["image"].to_pylist() == [pages.picture("a")] * 5
    assert samples["sample_id"].to_pylist() == sorted(samples["sample_id"].to_pylist())
    assert [pq.ParquetFile(path).metadata.row_group(i).num_rows for i in range(2)] == [4, 1]
    assert staging.parts_done(3) == {0}


def test_a_part_that_is_done_is_not_fetched_again(web: Any, pages: Any, refresh_config: Build, fetch_all: Any) -> None:
    web.pages["/a"] = pages.image("a")
    config = refresh_config([("/a", "a picture")])
    _, first = fetch_all(config)
    _, again = fetch_all(config)
    assert first == again
    assert web.requests == {"/a": 1}


def test_withdrawn_and_blocked_pictures_are_not_stored(
    web: Any, pages: Any, refresh_config: Build, fetch_all: Any, tmp_path: Path
) -> None:
    import hashlib

    for name in ("withdrawn", "blocked", "fine"):
        web.pages[f"/{name}"] = pages.image(name)
    digests = {name: hashlib.sha256(pages.picture(name)).hexdigest() for name in ("withdrawn", "blocked")}
    (tmp_path / "blocked.txt").write_text(f"{digests['blocked']}\n")
    gone = pa.Table.from_pylist([{"source_sha256": digests["withdrawn"], "reason": "takedown"}], schema=WITHDRAWN)
    pairs = [(f"/{name}", f"picture {name}") for name in ("withdrawn", "blocked", "fine")]
    config = refresh_config(pairs, judge={"block_hashes": str(tmp_path / "blocked.txt")})
    staging, _ = fetch_all(config, withdrawn=gone)
    verdicts = {o["caption"]: (o["reason"], o["state"], o["stored"]) for o in outcomes_of(staging)}
    assert verdicts == {
        "picture withdrawn": (Reason.WITHDRAWN, State.REJECTED, False),
        "picture blocked": (Reason.BLOCKED_IMAGE, State.BLOCKED, False),
        "picture fine": (None, State.OK, True),
    }


def test_a_row_group_too_large_says_what_to_do(
    web: Any, pages: Any, refresh_config: Build, fetch_all: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        web.pages[f"/{number}"] = pages.image(str(number))
    monkeypatch.setattr(part_files, "MAX_ROW_GROUP_BYTES", 2000)
    with pytest.raises(RunFailed, match=r"set publish\.rows_per_row_group lower"):
        fetch_all(refresh_config([(f"/{number}", "a picture") for number in range(4)]))


def test_the_language_of_what_is_stored_is_told(web: Any, pages: Any, refresh_config: Build, fetch_all: Any) -> None:
    web.pages["/a"] = web.pages["/b"] = pages.image("a")
    english, german = "a dog and a cat are sleeping on the old sofa", "ein Hund und eine Katze schlafen auf dem Sofa"
    staging, _ = fetch_all(refresh_config([("/a", english), ("/b", german), ("/gone", english)]))
    assert {(o["caption"], o["admitted"]): o["language"] for o in outcomes_of(staging)} == {
        (english, True): "en",
        (german, True): "de",
        (english, False): None,
    }


def test_reports_count_verdicts(web: Any, pages: Any, refresh_config: Build, fetch_all: Any) -> None:
    web.pages["/a"] = pages.image("a")
    _, reports = fetch_all(refresh_config([("/a", "a picture"), ("/b", "a picture")]), links_per_part=1)
    verdicts = Counter()
    for report in reports:
        verdicts.update(report.verdicts)
    assert verdicts == {"": 1, "not_found": 1}


@pytest.mark.ray
def test_what_a_worker_fails_of_is_told_as_it_was(
    ray_cluster: Any, refresh_config: Build, tokenizer_file: Path, tmp_path: Path
) -> None:
    staging = Staging(Store(tmp_path / "dataset"), "refresh")
    gone = Withdrawn(WITHDRAWN.empty_table())
    config = refresh_config([("/a", "a picture")])
    job = FetchJob(config, staging, Tokenizer.load(tokenizer_file), gone)
    with pytest.raises(RunFailed, match=r"a fetching worker failed: FileNotFoundError: .*b00000.plan.parquet"):
        list(run_parts([(0, 0), (0, 1)], job))
    bad = config.model_copy(update={"judge": config.judge.model_copy(update={"block_hashes": "/nowhere"})})
    with pytest.raises(BadInput, match="the list /nowhere cannot be read"):
        list(run_parts([(0, 0)], FetchJob(bad, staging, Tokenizer.load(tokenizer_file), gone)))
