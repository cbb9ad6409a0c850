"""Killed at any moment and started again: the published rows equal those of an undisturbed refresh."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from coca.contract import VersionRecord
from coca.dataset import Dataset
from coca.storage import Store
from pipelines.config import RefreshConfig
from pipelines.refresh import refresh

Build = Callable[..., RefreshConfig]

# What the clock decides.
_TIMES = {"fetched_at", "event_at", "next_check_at"}


class Killed(BaseException):
    """As sudden as a SIGKILL for code that catches exceptions."""


def links(web: Any, pages: Any, count: int) -> list[tuple[str | None, str | None]]:
    for number in range(count):
        web.pages[f"/{number}"] = pages.image(f"{number % (count - 3)}")  # three pictures lie under two urls
    web.pages["/500"] = pages.answer(500)
    pairs: list[tuple[str | None, str | None]] = [(f"/{number}", f"picture {number}") for number in range(count)]
    return [*pairs, ("/0", "another caption"), ("/500", "an error"), ("/404", "a dead link"), (None, "no url")]


def published(dataset: str) -> dict[str, Any]:
    """All that a version says and holds, but for the clock; and every file that lies in the folder."""
    opened = Dataset(dataset)
    tables = {}
    for name in ("samples", "annotations", "links"):
        version = getattr(opened.record, name).delta_version
        rows = DeltaTable(f"{dataset}/{name}", version=version).to_pyarrow_table().to_pylist()
        plain = [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]
        tables[name] = sorted(plain, key=lambda row: row["sample_id"])
    folder = Path(dataset)
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() and path.parent.name != "leases")
    return {
        "tables": tables,
        "row_groups": opened.row_groups.to_pylist(),
        "record": comparable(opened.record),
        "files": sorted(str(path) for path in files if "_delta_log" not in path.parts),
        "tokens": [opened.read_row_group(i)["tokens"].to_pylist() for i in range(opened.row_groups.num_rows)],
    }


def comparable(record: VersionRecord) -> dict[str, Any]:
    values = record.model_dump()
    values["config"]["to"] = values["created_at"] = None
    values["code_version"] = None  # asked of git by each process: a commit during a long test changes it
    for name in ("samples", "annotations", "links"):
        del values[name]["delta_version"]  # a roll-back is a commit too
    return values


def kill_at_step(monkeypatch: pytest.MonkeyPatch, step: int | None, *, after: bool) -> list[str]:
    """Let the given write (counted over all kinds) be the last; returns the names of the writes, as they happen."""
    steps: list[str] = []

    def counted(kind: str, write: Callable[..., Any], name_of: Callable[..., str]) -> Callable[..., Any]:
        def wrapper(*arguments: Any, **options: Any) -> Any:
            if "leases/" in name_of(*arguments):  # a clock's, not a step of the refresh
                return write(*arguments, **options)
            if step is not None and len(steps) > step:
                raise Killed  # threads of a dead process write nothing
            steps.append(f"{kind} {name_of(*arguments)}")
            mine = len(steps) - 1
            if mine == step and not after:
                raise Killed
            result = write(*arguments, **options)
            if mine == step:
                raise Killed
            return result

        return wrapper

    def path_of(_: Any, path: str, *__: Any) -> str:
        return path

    def uri_of(table: DeltaTable, *_: Any) -> str:
        return table.table_uri.removeprefix("file://").rstrip("/")

    monkeypatch.setattr(Store, "write", counted("write", Store.write, path_of))
    monkeypatch.setattr(Store, "write_once", counted("write_once", Store.write_once, path_of))
    monkeypatch.setattr(Store, "delete", counted("delete", Store.delete, path_of))
    commit = DeltaTable.create_write_transaction
    monkeypatch.setattr(DeltaTable, "create_write_transaction", counted("commit", commit, uri_of))
    return steps


def run_killed_at(config: RefreshConfig, step: int, *, after: bool) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at_step(patch, step, after=after)
        refresh(config)


def check_kills(build: Build, web: Any, pages: Any, choose: Callable[[int], list[int]]) -> None:
    pairs = links(web, pages, 12)
    publish = {"links_per_part": 4, "links_per_batch": 8}
    undisturbed = build(pairs, publish=publish)
    with pytest.MonkeyPatch.context() as patch:
        steps = kill_at_step(patch, None, after=False)
        refresh(undisturbed)
    expected = published(undisturbed.to)
    for step in choose(len(steps)):
        for after in (False, True):
            config = undisturbed.model_copy(update={"to": f"{undisturbed.to}-{step}-{after}"})
            run_killed_at(config, step, after=after)
            result = refresh(config)
            assert published(config.to) == expected, f"killed {'after' if after else 'at'} {steps[step]}"
            assert result.links == result.samples + sum(result.rejected.values()) == 16
            assert refresh(config).changed is False


def test_the_order_of_the_writes_is_that_of_the_contract(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = refresh_config(links(web, pages, 8), publish={"links_per_part": 6, "links_per_batch": 6})
    steps = kill_at_step(monkeypatch, None, after=False)
    refresh(config)
    name = Dataset(config.to).record.refresh_id
    staging = f"staging/{name}"
    planned = [step for step in steps if not step.startswith("write links/")][
        : steps.index(f"write_once {staging}/plan.json")
    ]
    assert all("staging/" in step for step in planned)
    wanted = [
        f"write_once {staging}/plan.json",
        f"write {staging}/b00000.plan.parquet",
        f"write {staging}/b00001.plan.parquet",
    ]
    for batch in range(2):
        wanted += [
            f"write samples/{name}-b{batch:05d}-p00000.parquet",
            f"write {staging}/b{batch:05d}/p00000.parquet",
        ]
    at = wanted.copy()
    commits = [step for step in steps if not step.startswith("write links/")]
    commits = commits[commits.index(wanted[0]) :]
    for batch in range(2):
        at += [
            f"write {staging}/b{batch:05d}.manifest.json",
            f"commit {config.to}/samples",
            f"commit {config.to}/links",
        ]
    assert sorted(commits[: len(at)]) == sorted(at)
    for batch in range(2):
        prefix = f"b{batch:05d}"
        order = [step for step in commits if prefix in step or "commit" in step]
        part = order.index(f"write {staging}/{prefix}/p00000.parquet")
        assert order.index(f"write samples/{name}-{prefix}-p00000.parquet") < part
        assert part < order.index(f"write {staging}/{prefix}.manifest.json")
    ending = commits[len(at) :]
    assert sorted(ending[:2]) + ending[2:] == [
        f"write annotations/{name}-b00000-p00000.parquet",
        f"write annotations/{name}-b00001-p00000.parquet",
        f"write {staging}/selection.json",
        f"commit {config.to}/annotations",
        f"commit {config.to}/links",
        f"write_once tokenizers/{Dataset(config.to).tokenizer.fingerprint}.json",
        "write_once versions/1.row_groups.parquet",
        "write_once versions/1.json",
        "delete staging",
    ]


def test_killed_at_a_few_writes(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    check_kills(refresh_config, web, pages, lambda steps: random.Random(1).sample(range(steps), 6))


@pytest.mark.soak
def test_killed_at_every_write(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    check_kills(refresh_config, web, pages, lambda steps: list(range(steps)))


def test_parts_that_are_staged_are_not_fetched_again(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    config = refresh_config(links(web, pages, 12), publish={"links_per_part": 4, "links_per_batch": 8})
    with pytest.MonkeyPatch.context() as patch:
        steps = kill_at_step(patch, None, after=False)
        refresh(config)
    first_batch_done = next(place for place, step in enumerate(steps) if step.startswith("commit"))
    again = config.model_copy(update={"to": f"{config.to}-again"})
    run_killed_at(again, first_batch_done, after=True)
    web.requests.clear()
    result = refresh(again)
    fetched_once = sum(web.requests.values())
    assert 0 < fetched_once < result.requests  # the restart asks only for the second batch


def test_an_abandoned_refresh_leaves_nothing_behind(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    """Killed after its commits, and the next refresh is another one: other links, other settings."""
    base = refresh_config([("/1", "picture 1")], publish={"links_per_part": 4})
    links_of_another = refresh_config(links(web, pages, 12), publish={"links_per_part": 4, "links_per_batch": 8})
    refresh(base)
    write_once = Store.write_once

    def until_the_record(store: Store, path: str, data: bytes) -> bool:
        if path == "versions/2.json":
            raise Killed
        return write_once(store, path, data)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Store, "write_once", until_the_record)
        refresh(links_of_another)
    assert DeltaTable(f"{base.to}/samples").count() == 13
    refreshed = refresh_config([("/1", "picture 1"), ("/2", "picture 2")], publish={"links_per_part": 4})
    result = refresh(refreshed)
    assert (result.version, result.samples, result.version_samples, result.rejected) == (2, 2, 2, {})
    record = Dataset(base.to).record
    assert (record.samples.rows, record.annotations.rows, record.links.rows) == (2, 2, 2)
    assert Store(base.to).list("staging") == []


def sigkill_and_complete(config: RefreshConfig, moments: list[Callable[[], bool]], ray_address: str) -> int:
    """Run ``coca data refresh`` and SIGKILL it at each moment; then let it complete.

    Returns:
        How many runs died of it: one may end before its moment.
    """
    path = Path(config.to).with_suffix(".yaml")
    path.write_text(config.to_yaml())
    command = [sys.executable, "-m", "jobs.cli", "data", "refresh", "--config", str(path)]
    environment = os.environ | {"RAY_ADDRESS": ray_address}
    kills = 0
    for moment in moments:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            while not moment() and process.poll() is None:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
    completed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    return kills


@pytest.mark.ray
def test_sigkill_while_fetching_and_while_committing(
    web: Any, pages: Any, refresh_config: Build, ray_cluster: Any
) -> None:
    pairs = links(web, pages, 40)
    publish = {"links_per_part": 10, "links_per_batch": 30}
    config = refresh_config(pairs, publish=publish, fetch=SLOW)
    staging = Path(config.to, "staging")
    moments = [lambda: sum(web.requests.values()) >= 8, lambda: any(staging.glob("*/b00000.manifest.json"))]
    assert sigkill_and_complete(config, moments, ray_cluster.address) == 2
    undisturbed = config.model_copy(update={"to": f"{config.to}-undisturbed"})
    refresh(undisturbed)
    killed, expected = published(config.to), published(undisturbed.to)
    assert killed == expected


SLOW = {"allow_networks": ["127.0.0.0/8"], "connections_per_domain": 2, "retries": 1, "backoff_s": 0.01}


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_sigkill_at_any_moment(web: Any, pages: Any, refresh_config: Build, ray_cluster: Any) -> None:
    pairs = links(web, pages, 60)
    config = refresh_config(pairs, publish={"links_per_part": 10, "links_per_batch": 30}, fetch=SLOW)
    undisturbed = config.model_copy(update={"to": f"{config.to}-undisturbed"})
    refresh(undisturbed)
    expected = published(undisturbed.to)
    random_, kills = random.Random(7), 0
    for round_ in range(6):
        again = config.model_copy(update={"to": f"{config.to}-{round_}"})
        ends_at = [random_.uniform(2, 10) for _ in range(2)]
        kills += sigkill_and_complete(again, [_after(seconds) for seconds in ends_at], ray_cluster.address)
        assert published(again.to) == expected, f"killed {ends_at} seconds in"
    assert kills >= 6


def _after(seconds: float) -> Callable[[], bool]:
    started: list[float] = []

    def is_past() -> bool:
        started.append(time.monotonic())
        return started[-1] - started[0] >= seconds

    return is_past
