"""Killed at any moment and started again: the published rows equal those of an undisturbed refresh."""

import asyncio
import contextlib
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from deltalake import DeltaTable

from coca.dataset import Dataset
from coca.storage import Store
from coca.tokenizer import Tokenizer
from coca.withdrawn import WITHDRAWN, Withdrawn
from pipelines.config import RefreshConfig
from pipelines.decode_pool import DecodePool
from pipelines.image_config import ImageConfig
from pipelines.lease import acquire_lease
from pipelines.parts import FetchJob, FetchPart
from pipelines.prepare import Prepared
from pipelines.refresh import refresh
from pipelines.staging import Staging, clear_staging
from tests.pipelines.killing import Command, copy_dataset, files_of, links, published

Build = Callable[..., RefreshConfig]

# So that a loaded machine makes no answer late.
PATIENT = {"timeout_s": 20.0}


class Killed(BaseException):
    """As sudden as a SIGKILL for code that catches exceptions."""


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
    monkeypatch.setattr(Store, "write_checked", counted("write", Store.write_checked, path_of))
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
    undisturbed = build(pairs, publish=publish, fetch=PATIENT)
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
    # How many follows from the hashes of the urls, and so from the web's port.
    batches = [f"b{batch:05d}" for batch in range(sum(step.endswith(".plan.parquet") for step in steps))]
    assert len(batches) > 1
    stored = [prefix for prefix in batches if f"write samples/{name}-{prefix}-p00000.parquet" in steps]
    at = [f"write_once {staging}/plan.json"]
    for prefix in batches:
        at += [
            f"write {staging}/{prefix}.plan.parquet",
            f"write {staging}/{prefix}/p00000.parquet",
            f"write {staging}/{prefix}.manifest.json",
            f"commit {config.to}/links",
        ]
    for prefix in stored:
        at += [f"write samples/{name}-{prefix}-p00000.parquet", f"commit {config.to}/samples"]
    commits = [step for step in steps if not step.startswith("write links/")]
    commits = commits[commits.index(at[0]) :]
    assert sorted(commits[: len(at)]) == sorted(at)
    for prefix in batches:
        order = [step for step in commits if prefix in step or "commit" in step]
        part = order.index(f"write {staging}/{prefix}/p00000.parquet")
        assert part < order.index(f"write {staging}/{prefix}.manifest.json")
        assert prefix not in stored or order.index(f"write samples/{name}-{prefix}-p00000.parquet") < part
    ending = [step for step in commits[len(at) :] if "staging/intake" not in step]
    assert sorted(ending[: len(stored)]) + ending[len(stored) :] == [
        *[f"write annotations/{name}-{prefix}-p00000.parquet" for prefix in stored],
        f"write {staging}/selection.json",
        f"commit {config.to}/annotations",
        f"commit {config.to}/links",
        f"write_once tokenizers/{Dataset(config.to).tokenizer.fingerprint}.json",
        "write_once versions/1.row_groups.parquet",
        "write_once versions/1.json",
        *[f"delete {staging}/{prefix}.manifest.json" for prefix in batches],
        f"delete {staging}/plan.json",
        f"delete {staging}/selection.json",
        "delete staging",
    ]


def test_killed_at_a_few_writes(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    check_kills(refresh_config, web, pages, lambda steps: random.Random(1).sample(range(steps), 4))


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


def test_a_file_that_a_killed_process_was_writing_is_no_file(
    web: Any, pages: Any, refresh_config: Build, without_ray: None
) -> None:
    """A SIGKILL between a file's bytes and its name."""
    config = refresh_config(links(web, pages, 8), fetch=PATIENT)
    undisturbed = config.model_copy(update={"to": f"{config.to}-undisturbed"})
    refresh(undisturbed)
    with pytest.MonkeyPatch.context() as patch:
        steps = kill_at_step(patch, None, after=False)
        refresh(config.model_copy(update={"to": f"{config.to}-steps"}))
    planned = next(place for place, step in enumerate(steps) if "plan.json" in step)
    run_killed_at(config, planned, after=False)
    spilled = next(path for path in Path(config.to, "staging").rglob("*.parquet") if path.parent.name == "s000")
    leftovers = [spilled.parent, Path(config.to, "samples"), Path(config.to, "versions")]
    for folder in leftovers:
        folder.mkdir(exist_ok=True)
        (folder / f".{spilled.name}.{'0' * 32}.tmp").write_bytes(spilled.read_bytes())
    assert refresh(config).links == 12
    assert published(config.to) == published(undisturbed.to)


def test_a_kill_while_staging_is_removed(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> None:
    """Some of the intake's files are gone, others not: the next refresh must not take it for whole."""
    config = refresh_config(links(web, pages, 8), fetch=PATIENT)
    kept = f"{config.to}-staging"

    def keep_and_clear(store: Store) -> None:
        copy_dataset(f"{config.to}/staging", kept)
        clear_staging(store)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.refresh.clear_staging", keep_and_clear)
        refresh(config)
    expected = published(config.to)
    deleted: list[str] = []
    for step in range(0, 40, 3):
        copy_dataset(kept, f"{config.to}/staging")
        with pytest.MonkeyPatch.context() as patch:
            deleted = delete_until(patch, step)
            with contextlib.suppress(Killed):
                clear_staging(Store(config.to))
        if len(deleted) < step:
            break
        assert refresh(config).changed is False
        assert published(config.to) == expected
    assert len(deleted) > 8
    assert Store(config.to).list("staging") == []


def delete_until(patch: pytest.MonkeyPatch, step: int) -> list[str]:
    """Let a folder's files go one by one, and die before the given one."""
    deleted: list[str] = []

    def delete(store: Store, path: str) -> None:
        under = sorted(Path(store.path(path)).rglob("*")) if Path(store.path(path)).is_dir() else []
        for file in [*(each for each in under if each.is_file()), Path(store.path(path))]:
            if len(deleted) >= step:
                raise Killed
            deleted.append(str(file))
            file.unlink() if file.is_file() else real_delete(store, path)

    real_delete = Store.delete
    patch.setattr(Store, "delete", delete)
    return deleted


def test_a_worker_that_outlives_its_refresh_writes_nothing(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, tokenizer_file: Path
) -> None:
    """The new epoch comes while the worker waits for its last answer."""
    config = refresh_config(links(web, pages, 8), fetch=PATIENT, publish={"links_per_part": 16})
    tokenizer = Tokenizer.from_json(tokenizer_file.read_text())
    with pytest.MonkeyPatch.context() as patch:
        steps = kill_at_step(patch, None, after=False)
        refresh(config.model_copy(update={"to": f"{config.to}-steps"}))
    run_killed_at(config, next(n for n, step in enumerate(steps) if "b00000.plan.parquet" in step), after=True)
    store = Store(config.to)
    (epoch,) = (int(name.removesuffix(".json")) for name in store.list("leases"))
    (name,) = (name for name in store.list("staging") if not name.startswith("intake"))
    before = files_of(store)
    withdrawn = Withdrawn(WITHDRAWN.empty_table())
    worker = FetchPart(FetchJob(config, Staging(store, name), tokenizer, withdrawn, lease_epoch=epoch))
    answer = web.pages["/0"]

    async def take_over(writer: asyncio.StreamWriter, number: int) -> None:
        lease = await asyncio.to_thread(acquire_lease, store, "coca data refresh", 60.0)
        await asyncio.to_thread(lease.release)
        await answer(writer, number)

    web.pages["/0"] = take_over
    try:
        report = worker({"batch": 0, "part": 0})
    finally:
        worker.close()
    assert f"(epoch {epoch}) was taken over by epoch {epoch + 1}".encode() in report["failure"]
    assert [path for path in files_of(store) if not path.startswith("leases/")] == [
        path for path in before if not path.startswith("leases/")
    ]


def test_a_decoder_that_is_killed_costs_no_image(pages: Any) -> None:
    """Before its first body, and between two."""

    def kill(pool: DecodePool) -> None:
        (worker,) = pool._all
        os.kill(worker._process.pid, signal.SIGKILL)

    async def prepare_and_kill() -> list[Prepared]:
        async with DecodePool(ImageConfig.model_validate({"limits": {"min_side": 32}}), 1) as pool:
            kill(pool)
            done = [await pool.prepare(pages.picture("a"))]
            kill(pool)
            return [*done, await pool.prepare(pages.picture("a"))]

    first, second = asyncio.run(prepare_and_kill())
    assert first.reason is None
    assert first == second


@pytest.mark.parametrize("same_links", [True, False])
def test_of_two_refreshes_at_once_one_is_refused(
    web: Any, pages: Any, refresh_config: Build, without_ray: None, tmp_path: Path, same_links: bool
) -> None:
    pairs = links(web, pages, 12)
    first = refresh_config(pairs, publish={"links_per_part": 4, "links_per_batch": 8}, fetch=PATIENT)
    second = first if same_links else refresh_config([*pairs[:6], ("/new", "a new one")], fetch=PATIENT)
    web.pages["/new"] = pages.image("new")
    gate, entered = threading.Event(), threading.Event()
    commit = DeltaTable.create_write_transaction

    def slowly(table: DeltaTable, *arguments: Any, **options: Any) -> None:
        entered.set()
        assert gate.wait(60)
        commit(table, *arguments, **options)

    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeltaTable, "create_write_transaction", slowly)
        running = threading.Thread(target=lambda: results.append(refresh(first)))
        running.start()
        try:
            assert entered.wait(30)
            refused = Command(second, tmp_path).run()
        finally:
            gate.set()
            running.join()
    assert (refused.returncode, refused.stdout) == (2, "")
    (line,) = refused.stderr.splitlines()
    assert "is being written by `coca data refresh` (process " in line
    assert (results[0].version, results[0].links) == (1, 16)
    after = refresh(second)
    assert (after.version, after.changed) == ((1, False) if same_links else (2, True))
    assert Dataset(first.to).record.samples.rows == (13 if same_links else 14)
