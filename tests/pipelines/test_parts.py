"""The stages of the job: what a part leaves, what it may hold, and how many fetch."""

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
import ray

from coca.contract import SAMPLES
from coca.errors import BadInput, RunFailed
from coca.storage import Store
from coca.tokenizer import Tokenizer
from pipelines import parts
from pipelines.config import PublishConfig, RefreshConfig
from pipelines.judge import judge_links
from pipelines.links import read_links
from pipelines.parts import OUTCOMES, FetchPart, write_part
from pipelines.plan import make_plan
from pipelines.refresh import refresh
from pipelines.staging import Staging

Build = Callable[..., RefreshConfig]


def test_the_captions_of_a_url_share_one_request(
    web: Any, pages: Any, refresh_config: Build, tokenizer_file: Any
) -> None:
    web.pages["/a"] = pages.image("a")
    config = refresh_config([("/a", f"caption {number}") for number in range(5)] + [("/gone", "dead link")])
    plan = make_plan(judge_links(read_links(config.links), config.judge), PublishConfig())
    staging = Staging(Store(config.to), "refresh", 3)
    tokenizer = Tokenizer.load(tokenizer_file)
    report = write_part(FetchPart(config)(plan), staging=staging, tokenizer=tokenizer, rows_per_row_group=4)
    assert web.requests == {"/a": 1, "/gone": 1}
    row = report.to_pylist()[0]
    assert (row["links"], row["requests"], row["bytes"]) == (6, 2, len(pages.picture("a")))
    outcomes = staging.read_table(staging.outcome_path(0), OUTCOMES).to_pylist()
    assert [o["attempts"] for o in outcomes] == [1] * 6
    assert sum(o["requests"] for o in outcomes) == 2
    assert {o["caption"]: o["tokens"] for o in outcomes if o["reason"] is None} == {
        f"caption {n}": tokenizer.encode([f"caption {n}"])[0] for n in range(5)
    }
    samples = staging.read_table("samples/refresh-b00003-p00000.parquet", SAMPLES)
    assert samples["image"].to_pylist() == [pages.picture("a")] * 5
    assert staging.parts_done() == {0}


def test_a_part_too_large_for_a_block_says_what_to_do(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        web.pages[f"/{number}"] = pages.image(str(number))
    monkeypatch.setattr(parts, "MAX_PART_BYTES", 2000)
    config = refresh_config([(f"/{number}", "a picture") for number in range(4)])
    with pytest.raises(RunFailed, match=r"set publish\.links_per_part lower"):
        refresh(config)
    smaller = refresh_config([(f"/{number}", "a picture") for number in range(4)], publish={"links_per_part": 1})
    assert refresh(smaller).samples == 4


@pytest.mark.parametrize(
    ("cpus", "wanted", "waiting", "expected"),
    [
        (4, None, 100, (2, 1.0)),
        (4, None, 1, (1, 1.0)),
        (4, 3, 100, (3, 1.0)),
        (4, 6, 100, (6, 0.5)),
        (2, None, 100, (1, 1.0)),
        (2, 2, 100, (2, 0.5)),
        (64, None, 100, (32, 1.0)),
    ],
)
def test_fetchers_leave_a_cpu_free(
    monkeypatch: pytest.MonkeyPatch, cpus: int, wanted: int | None, waiting: int, expected: tuple[int, float]
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    workers, each = parts._plan_workers(wanted, waiting)
    assert (workers, each) == expected
    assert workers * each <= cpus - 1


@pytest.mark.parametrize(
    ("cpus", "wanted", "way_out"), [(4, 7, "Set fetch.workers to 6 or fewer"), (1, None, "Give Ray 2 CPUs or more")]
)
def test_more_fetchers_than_the_cluster_has_room_for(
    monkeypatch: pytest.MonkeyPatch, cpus: int, wanted: int | None, way_out: str
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus)})
    with pytest.raises(BadInput, match=way_out):
        parts._plan_workers(wanted, 100)


def test_a_samples_file_is_the_same_bytes_for_the_same_rows() -> None:
    row = {field.name: None for field in SAMPLES} | {"sample_id": "a"}
    row |= dict.fromkeys(("url", "caption", "format", "source_sha256", "sha256"), "x")
    row |= dict.fromkeys(("width", "height", "original_width", "original_height", "phash", "fetched_at"), 1)
    row["image"] = b"bytes"
    table = pa.Table.from_pylist([row] * 9, schema=SAMPLES)
    assert parts.encode_samples(table, 4) == parts.encode_samples(table, 4)
