import io
import threading
import time

import pytest

from coca import progress as progress_module
from coca.progress import Progress, format_duration, polling


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands at ``clock[0]`` seconds."""
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_at_most_every_five_seconds_and_once_at_the_end(clock: list[float]):
    out = io.StringIO()
    with Progress("fetch", total=100, unit="links", stream=out) as progress:
        for _ in range(40):  # half a second each: lines at 5, 10, 15 and 20 s
            clock[0] += 0.5
            progress.advance(note="2 failed")
    lines = out.getvalue().splitlines()
    assert len(lines) == 5
    assert lines[0] == "fetch: 10/100 links, 2.0 links/s, 45s left, 2 failed"
    assert lines[-1] == "fetch: 40/100 links, 2.0 links/s, done in 20s, 2 failed"


def test_unknown_total_has_no_time_left(clock: list[float]):
    out = io.StringIO()
    with Progress("read", unit="rows", stream=out) as progress:
        clock[0] = 10.0
        progress.advance(20_000)
    assert out.getvalue().splitlines() == [
        "read: 20,000 rows, 2,000.0 rows/s",
        "read: 20,000 rows, 2,000.0 rows/s, done in 10s",
    ]


def test_an_error_says_stopped_and_nothing_counted_says_nothing(clock: list[float]):
    out = io.StringIO()
    progress = Progress("read", stream=out)
    progress.advance()
    clock[0] = 2.0
    with pytest.raises(KeyError), progress:
        raise KeyError
    assert "stopped in 2s" in out.getvalue()
    out = io.StringIO()
    with Progress("read", stream=out):
        pass
    assert out.getvalue() == ""


def test_terminal_shows_a_bar():
    out = Terminal()
    with Progress("fetch", total=4, unit="links", stream=out) as progress:
        progress.advance(4, note="1 failed")
    assert "100%" in out.getvalue()
    assert "4/4" in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (60, "1m00s"), (125, "2m05s"), (11_040, "3h04m")]
)
def test_durations(seconds: float, text: str):
    assert format_duration(seconds) == text


def test_polling_goes_on_during_the_block_and_once_after_it() -> None:
    calls: list[int] = []
    enough = threading.Event()

    def poll() -> None:
        calls.append(1)
        if len(calls) == 3:
            enough.set()

    with polling(poll, every_s=0.01):
        assert enough.wait(10)
        during = len(calls)
    assert len(calls) > during
    after = len(calls)
    time.sleep(0.05)
    assert len(calls) == after
