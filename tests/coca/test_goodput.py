"""Goodput on a clock of our own: every second has one cause, over kills and restarts."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from coca.errors import BadInput
from coca.goodput import FILE, LOSSES, Goodput, note_launch, read_goodput
from coca.storage import Store

BEGAN = 1_800_000_000.0


class Clock:
    """Wall-clock time that stands still until told."""

    def __init__(self) -> None:
        self.now = BEGAN

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run")


def account(store: Store) -> dict[str, Any]:
    found = read_goodput(store)
    assert found is not None
    return found


def seconds(store: Store) -> dict[str, float]:
    return {cause: value for cause, value in account(store)["seconds"].items() if value}


def run_steps(goodput: Goodput, clock: Clock, steps: range, step_s: float = 2.0) -> None:
    for step in steps:
        clock.pass_by(step_s)
        goodput.step(step)


def test_a_run_undisturbed(store: Store, clock: Clock) -> None:
    note_launch(store, clock)
    clock.pass_by(5)
    goodput = Goodput(store, workers=2, clock=clock)
    clock.pass_by(3)
    goodput.begin(0)
    run_steps(goodput, clock, range(1, 5))
    clock.pass_by(1)
    goodput.lose("data", 1)
    clock.pass_by(0.5)
    goodput.lose("checkpoint", 0.5)
    run_steps(goodput, clock, range(5, 11))
    clock.pass_by(4)
    goodput.lose("evaluation", 4)
    clock.pass_by(0.5)
    goodput.close(finished=True)
    assert seconds(store) == {"new_steps": 20, "starting": 8, "data": 1, "checkpoint": 1, "evaluation": 4}
    found = account(store)
    assert (found["wall_s"], found["began"], found["furthest_step"]) == (34, BEGAN, 10)
    assert found["goodput"] == pytest.approx(20 / 34)
    assert found["attempts"] == [{"time": BEGAN + 5, "from_step": 0, "to_step": 10, "workers": 2}]
    assert goodput.row() == {
        "goodput": 20 / 34,
        "lost_s": {"starting": 8, "checkpoint": 1, "evaluation": 4, "data": 1},
    }


def test_a_killed_worker_costs_its_absence_and_the_steps_since_its_checkpoint(store: Store, clock: Clock) -> None:
    first = Goodput(store, workers=4, clock=clock)
    clock.pass_by(1)
    first.begin(0)
    run_steps(first, clock, range(1, 8))
    # Killed here; its checkpoint is of step 4. Ray brings up another attempt, on half the workers.
    clock.pass_by(6)
    second = Goodput(store, workers=2, clock=clock)
    clock.pass_by(2)
    second.lose("restoring", 1.5)
    second.begin(4)
    run_steps(second, clock, range(5, 8), step_s=4)
    assert seconds(store) == {"new_steps": 14, "starting": 1.5, "down": 6, "restoring": 1.5, "replayed": 12}
    run_steps(second, clock, range(8, 11), step_s=4)
    second.close(finished=True)
    assert seconds(store) == {"new_steps": 26, "starting": 1.5, "down": 6, "restoring": 1.5, "replayed": 12}
    assert account(store)["wall_s"] == clock.now - BEGAN
    assert [(a["from_step"], a["to_step"], a["workers"]) for a in account(store)["attempts"]] == [(0, 7, 4), (4, 10, 2)]


def test_a_killed_command_is_down_until_it_is_given_again(store: Store, clock: Clock) -> None:
    note_launch(store, clock)
    clock.pass_by(2)
    Goodput(store, workers=1, clock=clock).begin(0)
    clock.pass_by(100)
    note_launch(store, clock)
    clock.pass_by(7)
    note_launch(store, clock)  # killed while its workers started, and given again
    clock.pass_by(3)
    Goodput(store, workers=1, clock=clock).begin(0)
    assert seconds(store) == {"starting": 12, "down": 100}


def test_a_run_that_stopped_on_notice_is_down_and_a_finished_one_is_not(store: Store, clock: Clock) -> None:
    def attempt(position: int, *, finished: bool) -> None:
        goodput = Goodput(store, workers=1, clock=clock)
        goodput.begin(position)
        run_steps(goodput, clock, range(position + 1, position + 3))
        goodput.close(finished=finished)

    attempt(0, finished=False)
    clock.pass_by(50)
    attempt(2, finished=True)
    clock.pass_by(1_000_000)
    attempt(4, finished=True)
    assert seconds(store) == {"new_steps": 12, "down": 50}


def test_a_step_that_hung_until_an_error_ended_it_is_down(store: Store, clock: Clock) -> None:
    goodput = Goodput(store, workers=1, clock=clock)
    goodput.begin(0)
    run_steps(goodput, clock, range(1, 3))
    clock.pass_by(600)
    goodput.close(finished=False)
    clock.pass_by(5)
    Goodput(store, workers=1, clock=clock).begin(2)
    assert seconds(store) == {"new_steps": 4, "down": 605}


def test_what_passed_after_the_last_writing_is_never_told_as_good(store: Store, clock: Clock) -> None:
    goodput = Goodput(store, workers=1, clock=clock)
    goodput.begin(0)
    for step in range(1, 8):
        clock.pass_by(0.3)
        goodput.step(step)
    # Written at 1.2 s, the steps after it are not.
    clock.pass_by(10)
    Goodput(store, workers=1, clock=clock).begin(0)
    assert seconds(store) == pytest.approx({"new_steps": 1.2, "down": 10.9})
    assert account(store)["attempts"][0]["to_step"] == 4


def test_a_clock_set_back_takes_nothing_away(store: Store, clock: Clock) -> None:
    goodput = Goodput(store, workers=1, clock=clock)
    goodput.begin(0)
    run_steps(goodput, clock, range(1, 4))
    clock.pass_by(-3600)
    run_steps(goodput, clock, range(4, 6))
    goodput.close(finished=True)
    assert seconds(store) == {"new_steps": 8}


def test_on_s3_no_step_waits_for_the_account_and_the_newest_is_written(
    s3: str, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(f"{s3}/run")
    goodput = Goodput(store, workers=1, clock=clock)
    goodput.begin(0)
    asked, answer, written, write = threading.Event(), threading.Event(), [], store.write

    def slow(path: str, data: bytes) -> None:
        asked.set()
        assert answer.wait(30)
        written.append(json.loads(data)["until"] - BEGAN)
        write(path, data)

    wait_for_writes(goodput)
    monkeypatch.setattr(store, "write", slow)
    run_steps(goodput, clock, range(1, 6))
    assert asked.wait(30)
    run_steps(goodput, clock, range(6, 29))  # due at 20, 30, 40 and 50 s too, and S3 does not answer
    assert written == []
    answer.set()
    wait_for_writes(goodput)
    assert written == [10, 50]
    goodput.close(finished=False)
    assert written[-1] == 56
    clock.pass_by(5)
    wait_for_writes(Goodput(store, workers=1, clock=clock))
    assert seconds(store) == {"new_steps": 56, "down": 5}


def wait_for_writes(goodput: Goodput) -> None:
    assert goodput._aside is not None
    goodput._aside.join(30)


def test_an_end_does_not_wait_for_ever_for_s3(s3: str, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    store, answer = Store(f"{s3}/run"), threading.Event()
    goodput = Goodput(store, workers=1, clock=clock)
    wait_for_writes(goodput)
    monkeypatch.setattr(store, "write", lambda path, data: answer.wait(30))
    monkeypatch.setattr("coca.goodput._CLOSING_S", 0.2)
    goodput.begin(0)
    began = time.monotonic()
    goodput.close(finished=True)
    assert time.monotonic() - began < 10
    answer.set()
    wait_for_writes(goodput)


def test_storage_that_is_away_ends_no_run(store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    goodput = Goodput(store, workers=1, clock=clock)
    goodput.begin(0)

    def away(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", away)
    run_steps(goodput, clock, range(1, 4))
    monkeypatch.undo()
    run_steps(goodput, clock, range(4, 5))
    assert seconds(store) == {"new_steps": 8}


def test_a_cause_that_nobody_knows_is_a_programmers_error(store: Store) -> None:
    with pytest.raises(ValueError, match=f"'lunch' is no cause of a loss: {', '.join(LOSSES)}"):
        Goodput(store, workers=1).lose("lunch", 1)


@pytest.mark.parametrize("damage", ['{"seconds": {}', "[]", "{}", '{"seconds": {"new_steps": 3}}', "\xff"])
def test_a_damaged_account_is_told_and_a_run_begins_a_new_one(
    damage: str, store: Store, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_goodput(store) is None
    store.write(FILE, damage.encode("latin-1"))
    with pytest.raises(BadInput, match=r"goodput\.json is damaged\. Remove it"):
        read_goodput(store)
    note_launch(store, clock)
    assert capsys.readouterr().err == f"goodput: {store.uri}/{FILE} is damaged: the account begins anew\n"
    clock.pass_by(3)
    Goodput(store, workers=1, clock=clock).begin(0)
    assert seconds(store) == {"starting": 3}


def test_a_launch_that_storage_does_not_take_starts_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(path: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", away)
    note_launch(store)
    assert capsys.readouterr().err.startswith("goodput: the start of the workers is not on the account: [Errno 28]")
