"""Progress that people can read: a bar on a terminal, a plain line every few seconds where there is none."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TextIO

from tqdm import tqdm

LINE_INTERVAL_S = 5.0


class Progress:
    """Counts work done, with rate and time left, on stderr.

    ::

        with Progress("fetch", total=1000, unit="links") as progress:
            progress.advance(10, note="2 failed")

    On a terminal it is a tqdm bar. Elsewhere (a log, a Ray job) it is a line at most every
    ``LINE_INTERVAL_S`` seconds and one at the end. ``total=None`` where the amount is not known;
    ``start`` is what was done before, in a run that goes on.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        unit: str = "items",
        stream: TextIO | None = None,
        start: int = 0,
    ) -> None:
        self.title, self.total, self.unit = title, total, unit
        self.count = self._start = start
        self._note = ""
        self._stream = stream or sys.stderr
        self._started_s = self._last_line_s = time.monotonic()
        self._bar: tqdm | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                desc=title, total=total, initial=start, unit=f" {unit}", file=self._stream, dynamic_ncols=True
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.count:
            self._print_line("stopped" if kind else "done")

    def advance(self, n: int = 1, note: str = "") -> None:
        """Count ``n`` more; ``note`` replaces the words shown behind the numbers."""
        self.count += n
        self._note = note or self._note
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif time.monotonic() - self._last_line_s >= LINE_INTERVAL_S:
            self._print_line()

    def _print_line(self, ending: str = "") -> None:
        self._last_line_s = time.monotonic()
        print(self._line(self._last_line_s - self._started_s, ending), file=self._stream, flush=True)

    def _line(self, elapsed_s: float, ending: str = "") -> str:
        amount = f"{self.count:,}" if self.total is None else f"{self.count:,}/{self.total:,}"
        rate = (self.count - self._start) / elapsed_s if elapsed_s > 0 else 0.0
        parts = [f"{self.title}: {amount} {self.unit}", f"{rate:,.1f} {self.unit}/s"]
        if ending:
            parts.append(f"{ending} in {format_duration(elapsed_s)}")
        elif self.total is not None and rate > 0:
            parts.append(f"{format_duration(max(self.total - self.count, 0) / rate)} left")
        return ", ".join([*parts, self._note] if self._note else parts)


@contextmanager
def polling(poll: Callable[[], None], every_s: float) -> Iterator[None]:
    """Call ``poll`` again and again in a thread while the block waits for something else, and once after it."""
    done = threading.Event()

    def work() -> None:
        finished = False
        while not finished:
            finished = done.wait(every_s)
            poll()

    thread = threading.Thread(target=work, name="polling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def format_duration(seconds: float) -> str:
    """``7s``, ``2m05s`` or ``3h04m``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
