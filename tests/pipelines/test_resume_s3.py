"""The same on S3, undisturbed and faulty: 503, late, cut short, and without an answer to what was done."""

import contextlib
import signal
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coca.errors import RunFailed
from coca.s3 import StoreFailed
from coca.storage import Store
from pipelines.config import RefreshConfig
from pipelines.link_files import open_table as open_links
from pipelines.refresh import refresh
from pipelines.tables import (
    DataFile,
    commit_files,
    create_tables,
    open_table,
    replace_bucket,
    replace_files,
    table_files,
)
from tests.pipelines.faulty_s3 import Faults, FaultyS3, faulty_s3
from tests.pipelines.killing import SLOW, Command, Reader, copy_dataset, links, published, soak, wait_until
from tests.s3_uploads import begin_upload, begun_uploads

Build = Callable[..., RefreshConfig]
KINDS = ["slow_down", "late_error", "lost", "cut", "slow"]
# Most of the time goes into waiting for the next attempt.
ROUNDS = pytest.mark.parametrize("rounds", [4, pytest.param(12, marks=pytest.mark.soak)])


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyS3]:
    """Stands between S3 and every client made from here on."""
    with faulty_s3(s3_server, seed=7) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


AWAY = Faults(slow_down=1.0, in_a_row=10**9)


def one_kind(kind: str, rate: float) -> Faults:
    return Faults(**{kind: rate, "slow_s": 0.05})


@pytest.mark.parametrize("kind", ["lost", "cut"])
def test_files_under_faults(s3: str, proxy: FaultyS3, kind: str) -> None:
    check_files(f"{s3}/d", proxy, kind, rounds=2)


@pytest.mark.soak
@pytest.mark.parametrize("kind", KINDS)
def test_many_files_under_faults(s3: str, proxy: FaultyS3, kind: str) -> None:
    check_files(f"{s3}/d", proxy, kind, rounds=10)


def check_files(uri: str, proxy: FaultyS3, kind: str, rounds: int) -> None:
    store = Store(uri)
    large = bytes(range(256)) * 400
    proxy.set(one_kind(kind, 0.25))
    for number in range(rounds):
        path = f"a/{number}"
        store.write(path, large)
        assert (store.read(path), store.size(path), store.exists(path)) == (large, len(large), True)
        with store.open(path) as source:
            assert source.read() == large
        assert store.write_once(f"once/{number}", b"mine") is True
        assert store.write_once(f"once/{number}", b"another's") is False
        assert store.list("once") == sorted(f"{each}" for each in range(number + 1))
        assert not store.exists(f"b/{number}")
        store.delete(path)
        assert not store.exists(path)
        with pytest.raises(FileNotFoundError):
            store.read(path)
    assert proxy.counts()[kind]


def test_the_answer_to_a_conditional_write_is_lost(s3: str, proxy: FaultyS3) -> None:
    store = Store(s3)
    for kind in ("lost", "late_error"):
        proxy.set(one_kind(kind, 0.6), only="^PUT ")
        for number in range(8):
            assert store.write_once(f"{kind}/{number}", f"{number}".encode()) is True
        assert proxy.counts()[kind] > 1


def test_a_write_that_was_long_under_way_does_not_land_on_a_later_one(s3: str, tmp_path: Path) -> None:
    """Its check passed, then another took the dataset over and wrote the same file."""
    for store, lands in ((Store(s3), False), (Store(tmp_path), True)):
        epochs = iter([1, 2])

        def check(store: Store = store, epochs: Iterator[int] = epochs) -> None:
            if next(epochs) == 2:
                raise RunFailed("taken over")
            store.write("samples/a", b"the holder's")

        with pytest.raises(RunFailed, match="taken over") if not lands else contextlib.nullcontext():
            store.write_checked("samples/a", b"a late one", check)
        # On disk a name is given in an instant: there is nothing between.
        assert store.read("samples/a") == (b"a late one" if lands else b"the holder's")
        store.write_checked("samples/a", b"the holder's second", lambda: None)
        assert store.read("samples/a") == b"the holder's second"


@pytest.mark.parametrize("kind", ["late_error", "lost"])
def test_the_answer_to_a_checked_write_is_lost(s3: str, proxy: FaultyS3, kind: str) -> None:
    store = Store(s3)
    proxy.set(one_kind(kind, 0.6), only="^PUT ")
    for number in range(8):
        store.write_checked("a", f"{number}".encode(), lambda: None)
        assert store.read("a") == f"{number}".encode()
    assert proxy.counts()[kind]


@ROUNDS
@pytest.mark.parametrize("kind", KINDS)
def test_a_commit_is_made_once(s3: str, proxy: FaultyS3, kind: str, rounds: int) -> None:
    store = Store(f"{s3}/d")
    create_tables(store)
    proxy.set(one_kind(kind, 0.5), only="^PUT .*/_delta_log/")
    for batch in range(rounds):
        files = [DataFile(path=f"f{batch}.parquet", size=3, rows=2)]
        store.write(f"samples/f{batch}.parquet", b"abc")
        commit_files(store, "samples", files, "r", batch)
        commit_files(store, "samples", files, "r", batch)
    assert proxy.counts()[kind]
    proxy.set(Faults())
    table = open_table(store, "samples")
    assert (table.version(), table.transaction_version("r")) == (rounds, rounds - 1)
    assert table_files(table) == {f"f{batch}.parquet": 2 for batch in range(rounds)}


class Untaken:
    """A lease nobody else wants."""

    def check(self) -> None: ...


@ROUNDS
@pytest.mark.parametrize("kind", ["late_error", "lost"])
def test_a_bucket_is_replaced_once(s3: str, proxy: FaultyS3, kind: str, rounds: int) -> None:
    store = Store(f"{s3}/d")
    create_tables(store)
    for batch, name in enumerate("ab"):
        file = DataFile(path=f"bucket=00/{name}.parquet", size=3, rows=2, bucket="00")
        store.write(f"links/{file.path}", b"abc")
        commit_files(store, "links", [file], "r", batch)
    proxy.set(one_kind(kind, 0.7), only="^PUT .*/_delta_log/")
    for name in string.ascii_lowercase[2 : 2 + rounds]:
        path = f"bucket=00/{name}.parquet"
        store.write(f"links/{path}", b"abc")
        replace_bucket(store, file.model_copy(update={"path": path}), Untaken())  # type: ignore[arg-type]
        assert table_files(open_table(store, "links")) == {path: 2}
    assert proxy.counts()[kind]


@ROUNDS
@pytest.mark.parametrize("kind", ["late_error", "lost"])
def test_a_table_is_replaced_once(s3: str, proxy: FaultyS3, kind: str, rounds: int) -> None:
    store = Store(f"{s3}/d")
    create_tables(store)
    proxy.set(one_kind(kind, 0.7), only="^PUT .*/_delta_log/")
    for number, name in enumerate(string.ascii_lowercase[:rounds]):
        file = DataFile(path=f"{name}.parquet", size=3, rows=2)
        store.write(f"annotations/{file.path}", b"abc")
        replace_files(store, "annotations", [file], f"rewrite-{name}", Untaken())  # type: ignore[arg-type]
        table = open_table(store, "annotations")
        assert (table_files(table), table.version()) == ({file.path: 2}, number + 1)
    assert proxy.counts()[kind]


@ROUNDS
def test_links_are_read_whole_or_not_at_all(s3: str, proxy: FaultyS3, rounds: int) -> None:
    text = "url,caption\n" + "".join(f"http://example.com/{number},a picture\n" for number in range(5000))
    Store(s3).write("links.csv", text.encode())
    proxy.set(one_kind("cut", 0.3), only="links.csv")
    for _ in range(rounds):
        with open_links(f"{s3}/links.csv", 1) as source:
            assert source.read() == text.encode()
    assert proxy.counts()["cut"]


@pytest.fixture
def undisturbed(web: Any, pages: Any, refresh_config: Build, without_ray: None) -> tuple[RefreshConfig, Any]:
    """A config for S3, and what a refresh by it publishes, as on local disk."""
    pairs = links(web, pages, 5)
    config = refresh_config(
        pairs, publish={"links_per_part": 4, "links_per_batch": 8, "lease_s": 60.0}, fetch={"timeout_s": 20.0}
    )
    refresh(config)
    return config, published(config.to)


def test_a_refresh_under_faults(s3: str, proxy: FaultyS3, undisturbed: tuple[RefreshConfig, Any]) -> None:
    config, expected = undisturbed
    proxy.set(Faults.all(0.04))
    config = config.model_copy(update={"to": f"{s3}/dataset"})
    result = refresh(config)
    assert refresh(config).changed is False
    injected = proxy.counts()
    proxy.set(Faults())
    assert published(config.to) == expected
    assert result.links == 9
    assert injected.total() - injected[""] > 5


def test_where_s3_stays_away_the_command_says_so_and_goes_on_later(
    s3: str, proxy: FaultyS3, undisturbed: tuple[RefreshConfig, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, expected = undisturbed
    config = config.model_copy(update={"to": f"{s3}/dataset"})
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    proxy.set(AWAY, only="/dataset/")
    command = Command(config, tmp_path)
    failed = command.run()
    assert (failed.returncode, failed.stdout) == (1, "")
    (line,) = failed.stderr.splitlines()
    assert line.startswith(f"error: {config.to} does not answer as it should: ")
    assert line.endswith("run the same command again once it does")
    # It goes away in the middle, right before the first commit.
    proxy.set(AWAY, only="PUT .*/samples/_delta_log/0*1.json")
    with pytest.raises(StoreFailed, match="does not answer"):
        refresh(config)
    assert isinstance(StoreFailed(""), RunFailed)
    proxy.set(Faults())
    for path in ("staging/outcomes", "samples/part"):  # as if it had been killed while it wrote them
        begin_upload(Store(config.to), path)
    refresh(config)
    assert published(config.to) == expected
    assert begun_uploads(Store(config.to)) == []


def test_a_store_that_refuses_is_not_asked_again(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_s3(s3_server, seed=1) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(FileNotFoundError, match="the bucket no-such-bucket"):
            Store("s3://no-such-bucket/d").write_once("a", b"1")
        assert proxy.counts().total() == 1


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(3600)
def test_sigkill_at_any_moment_on_s3(
    web: Any,
    pages: Any,
    refresh_config: Build,
    ray_cluster: Any,
    s3: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At least 15 kills on S3."""
    soak(refresh_config, web, pages, f"{s3}/soak", ray_cluster.address, tmp_path, capsys)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_process_behind_a_faulty_s3(
    web: Any, pages: Any, refresh_config: Build, s3: str, s3_server: str, tmp_path: Path
) -> None:
    """Driver and actors, at 8 % faults; once S3 goes away while they fetch, and once the driver is killed."""
    web.pages["/base"] = pages.image("base")
    base = refresh_config([("/base", "in the first version")], to=f"{s3}/base", fetch=SLOW)
    assert Command(base, tmp_path).run().returncode == 0
    publish = {"links_per_part": 10, "links_per_batch": 30, "lease_s": 60.0}
    config = refresh_config(links(web, pages, 60, delay_s=0.1), to=f"{s3}/undisturbed", publish=publish, fetch=SLOW)
    copy_dataset(base.to, config.to)
    assert Command(config, tmp_path).run().returncode == 0
    expected = published(config.to)
    for seed in range(3):
        again = config.model_copy(update={"to": f"{s3}/faulty-{seed}"})
        copy_dataset(base.to, again.to)
        with faulty_s3(s3_server, seed, Faults.all(0.08)) as proxy, Reader(again.to) as reader:
            command = Command(again, tmp_path, AWS_ENDPOINT_URL=proxy.endpoint, AWS_MAX_ATTEMPTS="4")
            asked = sum(web.requests.values())
            process = command.start()
            assert wait_until(lambda asked=asked: sum(web.requests.values()) > asked + 15, process)
            if seed == 1:
                proxy.set(AWAY)
                _, stderr = process.communicate(timeout=600)
                assert process.returncode == 1
                assert "Traceback" not in stderr
                assert stderr.splitlines()[-1].startswith("error: ")
                assert "does not answer as it should" in stderr.splitlines()[-1]
            elif seed == 2:
                process.send_signal(signal.SIGKILL)
            process.communicate()
            proxy.set(Faults.all(0.08))
            for _ in range(4):  # a command may give up; it goes on where it was
                done = command.run()
                if done.returncode == 0:
                    break
                assert "Traceback" not in done.stderr
                time.sleep(1)
            assert done.returncode == 0, done.stderr
            assert proxy.counts().total() - proxy.counts()[""] > 10
        assert published(again.to) == expected
        assert (reader.failures, sorted(reader.rows)) == ([], [1, 2])
