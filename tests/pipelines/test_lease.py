"""The lease: one holder, whoever is killed, and no commit of one who has lost it."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from coca.errors import BadInput, RunFailed
from coca.storage import Store
from pipelines import lease as lease_module
from pipelines.lease import LeaseRecord, ProcessStamp, acquire_lease, hold_lease, list_epochs, read_lease

HOLD = """
import sys, time
from coca.storage import Store
from pipelines.lease import hold_lease
with hold_lease(Store(sys.argv[1]), "coca data refresh", float(sys.argv[2])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["disk", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return Store(f"{request.getfixturevalue('s3')}/d" if request.param == "s3" else tmp_path / "d")


def hold_elsewhere(store: Store, ttl_s: float = 60.0) -> subprocess.Popen[str]:
    """A process that holds the lease, until it is killed."""
    command = [sys.executable, "-c", HOLD, store.uri, str(ttl_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def write_lease(store: Store, epoch: int, **changes: Any) -> LeaseRecord:
    now = time.time()
    elsewhere = ProcessStamp(host="elsewhere", pid=1, namespace="other", started="1")
    record = LeaseRecord(holder=elsewhere, command="coca data refresh", acquired_at=now, expires_at=now + 60)
    record = record.model_copy(update=changes)
    store.write(f"leases/{epoch}.json", record.model_dump_json().encode())
    return record


def test_the_epoch_rises_with_every_holder_and_old_files_go(store: Store) -> None:
    for epoch in (1, 2, 3):
        with hold_lease(store, "coca data refresh") as lease:
            assert lease.epoch == epoch
            lease.check()
            assert list_epochs(store) == [epoch]
    record = read_lease(store, 3)
    assert record is not None
    assert record.released
    assert [name for name in store.list("leases") if "probe" in name] == []


def test_it_is_released_when_the_work_fails(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(ZeroDivisionError), hold_lease(store, "coca data refresh"):
        _ = 1 / 0
    with hold_lease(store, "coca data refresh") as lease:
        assert lease.epoch == 2


def test_of_many_at_once_exactly_one_gets_in(store: Store) -> None:
    ready = threading.Barrier(6)
    won: list[int] = []
    refused: list[str] = []

    def work(number: int) -> None:
        ready.wait()
        try:
            with hold_lease(store, f"worker {number}", 3.0) as lease:
                won.append(lease.epoch)
                deadline_s = time.monotonic() + 20
                while len(refused) < 5 and time.monotonic() < deadline_s:
                    time.sleep(0.02)
                lease.check()
        except BadInput as error:
            refused.append(str(error))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [1]
    assert len(refused) == 5
    assert [text for text in refused if "is being written by `worker" not in text] == []


def test_a_killed_process_of_this_host_is_followed_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    process = hold_elsewhere(store)
    process.kill()
    process.wait()
    started_s = time.monotonic()
    with hold_lease(store, "coca data refresh") as lease:
        assert lease.epoch == 2
    assert time.monotonic() - started_s < 2


def test_a_living_process_is_named_with_the_way_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    process = hold_elsewhere(store, ttl_s=1.0)
    try:
        with pytest.raises(BadInput) as caught, hold_lease(store, "coca data purge"):
            pass
    finally:
        process.kill()
        process.wait()
    text = str(caught.value)
    assert f"is being written by `coca data refresh` (process {process.pid} on " in text
    assert "since 20" in text
    assert "Let it finish, or end that process" in text


def test_a_number_given_again_is_another_process() -> None:
    own = ProcessStamp.own()
    assert not own.is_dead()
    assert own.model_copy(update={"started": "1"}).is_dead()
    assert not own.model_copy(update={"started": "1", "namespace": "another boot"}).is_dead()
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    time.sleep(0.5)  # ended, and not waited for
    assert own.model_copy(update={"pid": zombie.pid}).is_dead()
    zombie.wait()


def test_one_elsewhere_is_waited_for_until_its_lease_expires(store: Store) -> None:
    record = write_lease(store, 7, expires_at=time.time() + 0.8)
    with hold_lease(store, "coca data refresh") as lease:
        assert lease.epoch == 8
        assert time.time() > record.expires_at
    write_lease(store, 20, released=True)
    with hold_lease(store, "coca data refresh") as lease:
        assert lease.epoch == 21


def test_who_is_taken_over_commits_nothing_more(store: Store) -> None:
    with hold_lease(store, "coca data refresh") as lease:
        write_lease(store, 2, command="coca data purge")
        with pytest.raises(RunFailed, match=r"was taken over by `coca data purge` \(process 1 on elsewhere, since"):
            lease.check()
    # Letting go of the lost lease changes nothing for the new holder.
    assert list_epochs(store)[-1] == 2
    taken = read_lease(store, 2)
    assert taken is not None
    assert not taken.released


def test_who_cannot_renew_commits_nothing_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    lease = acquire_lease(store, "coca data refresh", 0.9)
    time.sleep(1.2)
    lease.check()  # renewed

    def unreachable(self: Store, path: str, data: bytes) -> None:
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", unreachable)
        time.sleep(1.0)
        with pytest.raises(RunFailed, match=r"could not be renewed for 0.9 s"):
            lease.check()
        lease.release()  # an unreachable store is no reason to fail
    with hold_lease(store, "coca data refresh") as second:
        assert second.epoch == 2


def test_an_epoch_that_others_have_passed_and_swept_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    write_lease(store, 3, released=True)
    real, looks = lease_module.list_epochs, iter([[1]])
    write_lease(store, 1, released=True)
    # The first look is from before the others came; epoch 2 is free by now, as they have swept it.
    monkeypatch.setattr(lease_module, "list_epochs", lambda store: next(looks, None) or real(store))
    with hold_lease(store, "coca data refresh") as lease:
        assert lease.epoch == 4


def test_a_store_that_ignores_conditions_is_refused(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(f"{s3}/d")
    put = store._s3.client.put_object
    monkeypatch.setattr(
        store._s3.client,
        "put_object",
        lambda IfNoneMatch, **request: put(**request),
    )
    with (
        pytest.raises(BadInput, match=r"ignores conditional writes \(If-None-Match\).*Use a store that honours them"),
        hold_lease(store, "coca data refresh"),
    ):
        pass
    assert store.list("leases") == []


def test_a_file_that_is_no_lease_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("leases/4.json", b"{}")
    with pytest.raises(BadInput, match=r"leases/4.json is no lease"), hold_lease(store, "coca data refresh"):
        pass


def test_a_read_that_a_renewal_cut_short_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    record = write_lease(store, 3)
    whole = store.read("leases/3.json")
    answers = iter([whole[:-3], whole[:-1], whole])
    monkeypatch.setattr(Store, "read", lambda self, path: next(answers))
    assert read_lease(store, 3) == record
