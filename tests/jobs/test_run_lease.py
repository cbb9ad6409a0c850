"""One command at a time on a run folder."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coca.errors import BadInput
from coca.storage import Store
from jobs import run_lease
from jobs.run_lease import TakenOver, hold_run
from pipelines.lease import LeaseRecord, ProcessStamp, list_epochs


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lease, "TTL_S", 0.6)
    monkeypatch.setattr(run_lease, "_LOOK_S", 0.02)
    monkeypatch.setattr(run_lease, "PATIENCE_S", 0.5)


def test_a_second_command_is_refused_while_the_first_lives(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with hold_run(store) as held:
        with pytest.raises(BadInput, match=r"is being written by `coca train` \(process \d+ on .* or end that process"):
            hold_run(store).__enter__()
        held()
    with hold_run(store) as held:
        held()


def test_one_that_ends_meanwhile_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Such as the driver of a cluster that was killed: it sees that a minute later."""
    monkeypatch.setattr(run_lease, "PATIENCE_S", 30)
    store = Store(tmp_path)
    first = hold_run(store)
    first.__enter__()
    threading.Timer(1.0, lambda: first.__exit__(None, None, None)).start()
    with hold_run(store) as held:
        held()
    assert "waiting up to 30 s: " in capsys.readouterr().err


def raised_by(held: Callable[[], None]) -> TakenOver | None:
    try:
        held()
    except TakenOver as taken:
        return taken
    return None


def test_who_was_taken_over_is_told_by_whom(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with hold_run(store) as held:
        held()
        other = ProcessStamp(host="elsewhere", pid=7, namespace=None, started=None)
        record = LeaseRecord(holder=other, command="coca train", acquired_at=0, expires_at=time.time() + 60)
        store.write(f"leases/{list_epochs(store)[-1] + 1}.json", record.model_dump_json().encode())
        ends_at = time.monotonic() + 10
        while (taken := raised_by(held)) is None and time.monotonic() < ends_at:
            time.sleep(0.01)
    assert taken is not None
    assert "taken over by `coca train` (process 7 on elsewhere" in str(taken)
    assert not taken.repeat_helps


def test_a_storage_that_is_away_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def away(store: Store) -> list[int]:
        looks.append(1)
        raise OSError("away")

    store = Store(tmp_path)
    with hold_run(store) as held:
        monkeypatch.setattr(run_lease, "list_epochs", away)
        ends_at = time.monotonic() + 10
        while len(looks) < 3 and time.monotonic() < ends_at:
            time.sleep(0.01)
        assert len(looks) >= 3
        held()
