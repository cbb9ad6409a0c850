"""Making things ahead: in order, no further than asked, and never in the way of the end."""

import threading
import time
from collections.abc import Iterator
from itertools import count

import pytest

from coca import prefetch as module
from coca.prefetch import prefetch


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_all_come_in_order_whatever_takes_long(depth: int) -> None:
    def slowly(number: int) -> int:
        time.sleep(0.01 if number % 2 == 0 else 0)
        return number * number

    assert list(prefetch(iter(range(9)), slowly, depth)) == [number * number for number in range(9)]


def test_no_more_than_the_depth_is_ahead() -> None:
    begun: list[int] = []

    def note() -> Iterator[int]:
        for number in count():
            begun.append(number)
            yield number

    made = prefetch(note(), lambda number: number, 3)
    for taken in range(4):
        assert next(made) == taken
        deadline = time.monotonic() + 10
        while len(begun) < taken + 4 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert begun == list(range(taken + 4))
    made.close()


def test_the_next_is_begun_while_one_is_finished() -> None:
    together = threading.Barrier(2, timeout=10)

    def finish(number: int) -> int:
        together.wait()
        return number

    made = prefetch(iter(range(4)), finish, 2)
    assert [next(made) for _ in range(4)] == [0, 1, 2, 3]
    made.close()


@pytest.mark.parametrize("where", ["begin", "finish"])
def test_an_error_comes_in_its_place(where: str) -> None:
    def begin() -> Iterator[int]:
        for number in count():
            if where == "begin" and number == 2:
                raise ValueError("the third")
            yield number

    def finish(number: int) -> int:
        if where == "finish" and number == 2:
            raise ValueError("the third")
        return number

    made = prefetch(begin(), finish, 4)
    assert [next(made), next(made)] == [0, 1]
    with pytest.raises(ValueError, match="the third"):
        next(made)


def test_closing_ends_threads_whose_error_nobody_takes() -> None:
    """As at the last step of a run, when a sample past its end does not decode."""
    failed = threading.Event()

    def finish(number: int) -> int:
        if number == 2:
            failed.set()
            raise ValueError
        return number

    made = prefetch(count(), finish, 2)
    next(made)
    assert failed.wait(10)
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("feed-")]


def test_closing_leaves_behind_what_is_held_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CLOSE_TIMEOUT_S", 0.1)
    held = threading.Event()

    def finish(number: int) -> int:
        if number:
            held.wait(30)
        return number

    made = prefetch(count(), finish, 3)
    next(made)
    started = time.monotonic()
    made.close()
    assert time.monotonic() - started < 5
    held.set()
