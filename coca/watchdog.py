"""A worker that hangs ends itself: whoever started it then starts it again, which it could not do for a worker that is
alive and stuck in a collective or a read."""

import faulthandler
import os
import sys
import threading
import time
from types import TracebackType
from typing import Self, TextIO

EXIT_HUNG = 85
FIRST_BEAT_FACTOR = 3.0  # a first step restores a checkpoint and compiles besides
GRACE_S = 5.0


class Watchdog:
    """Wants a beat every ``timeout_s`` seconds; without one it prints every thread's stack and ends the process.

    ::

        with Watchdog(600.0, "worker 3") as watchdog:
            while training:
                step()
                watchdog.beat()

    A thread watches; where a hang in native code holds the interpreter, so that no Python thread can run,
    faulthandler's own timer does the same ``GRACE_S`` seconds later. A process has one such timer, and so one watchdog
    at a time. Until the first beat three times ``timeout_s`` may pass.
    """

    def __init__(self, timeout_s: float, name: str, stream: TextIO | None = None) -> None:
        """
        Args:
            stream: a file with a descriptor; by default stderr.
        """
        self._timeout_s, self._name, self._stream = timeout_s, name, stream or sys.stderr
        self._limit_s = timeout_s * FIRST_BEAT_FACTOR
        self._beat_at, self._armed_at = time.monotonic(), 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._beat_at = time.monotonic()
        self._arm()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """The worker has ended a step."""
        self._limit_s = self._timeout_s
        self._beat_at = time.monotonic()
        if self._beat_at - self._armed_at > min(GRACE_S, self._timeout_s) / 2:  # each time it is a new native thread
            self._arm()

    def _arm(self) -> None:
        self._armed_at = time.monotonic()
        faulthandler.dump_traceback_later(self._limit_s + GRACE_S, file=self._stream, exit=True)

    def _watch(self) -> None:
        while not self._ended.wait(max(self._beat_at + self._limit_s - time.monotonic(), 0.01)):
            silent_s = time.monotonic() - self._beat_at
            if silent_s >= self._limit_s:
                line = f"{self._name} ended no step for {silent_s:.1f} s and ends itself; its threads stood here:"
                print(line, file=self._stream, flush=True)
                faulthandler.dump_traceback(self._stream)
                os._exit(EXIT_HUNG)
