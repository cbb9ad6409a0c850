"""Things made ahead of their use, in threads, and taken in order."""

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Generic, NamedTuple, TypeVar

Started = TypeVar("Started")
Made = TypeVar("Made")

# While one thread waits for the last of its batch to be decoded, the other one gives the decoder the next.
_THREADS = 2
_CLOSE_TIMEOUT_S = 5.0


def prefetch(started: Iterator[Started], finish: Callable[[Started], Made], depth: int) -> Generator[Made]:
    """``finish`` of each of ``started``, in order, at most ``depth`` of them ahead of the one that was taken last.

    ``started`` is gone through by one thread at a time. Closing the generator stops the threads; one that is held up,
    by storage that does not answer say, is left behind. What they raise is raised in its place in the order.
    """
    ahead = _Ahead(started, finish, depth)
    try:
        yield from ahead.take()
    finally:
        ahead.close()


class _Failed(NamedTuple):
    error: BaseException


class _Ahead(Generic[Started, Made]):
    """The threads of one `prefetch` and what they have made so far."""

    def __init__(self, started: Iterator[Started], finish: Callable[[Started], Made], depth: int) -> None:
        self._started, self._finish = started, finish
        self._turn, self._room = threading.Lock(), threading.Semaphore(depth)
        self._made: dict[int, Made | _Failed] = {}
        self._changed = threading.Condition()
        self._next, self._stopped = 0, False
        self._threads = [
            threading.Thread(target=self._work, name=f"feed-{number}", daemon=True)
            for number in range(min(_THREADS, depth))
        ]
        for thread in self._threads:
            thread.start()

    def take(self) -> Generator[Made]:
        for number in itertools.count():
            with self._changed:
                while number not in self._made:
                    self._changed.wait()
                made = self._made.pop(number)
            if isinstance(made, _Failed):
                if isinstance(made.error, StopIteration):
                    return
                raise made.error
            self._room.release()
            yield made
            del made

    def close(self) -> None:
        self._stopped = True
        for _ in self._threads:
            self._room.release()
        ends = time.monotonic() + _CLOSE_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))

    def _work(self) -> None:
        while True:
            self._room.acquire()
            with self._turn:
                if self._stopped:
                    return
                number, self._next = self._next, self._next + 1
                try:
                    started = next(self._started)
                except BaseException as error:  # raised by who takes it
                    return self._hand_over(number, _Failed(error))
            try:
                self._hand_over(number, self._finish(started))
            except BaseException as error:  # raised by who takes it
                return self._hand_over(number, _Failed(error))
            del started  # it may hold what has been made of it, which is no longer ours while we wait

    def _hand_over(self, number: int, made: Made | _Failed) -> None:
        with self._changed:
            self._made[number] = made
            self._changed.notify_all()
