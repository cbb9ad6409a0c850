"""Runs a command and adds up what it and all its descendants cost, daemons included."""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_SAMPLE_S = 0.1


@dataclass(frozen=True)
class Cost:
    """Wall-clock and CPU seconds."""

    seconds: float
    cpu_seconds: float


def run(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Cost:
    """Run to the end. Descendants that outlive the command become ours; they are counted and ended.

    CPU time is what each process had taken when it was last seen: the sum that the kernel hands to parents misses those
    whose parent ignores its children, as Ray's does.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    meter = _Meter(excepted={os.getpid()} | _children())
    started = time.monotonic()
    with log.open("wb") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=dict(environment)).returncode
    seconds = time.monotonic() - started
    cpu_seconds = meter.stop()
    _end_children(meter.excepted)
    if code:
        sys.exit(f"error: exit code {code} of {' '.join(command[:4])} ...:\n{log.read_text(errors='replace')[-3000:]}")
    return Cost(seconds, cpu_seconds)


class _Meter(threading.Thread):
    """Reads /proc over and over: CPU seconds by (pid, start) of every descendant of ours."""

    def __init__(self, excepted: set[int]) -> None:
        super().__init__(daemon=True)
        self.excepted = excepted
        self._stopped = threading.Event()
        self._ticks: dict[tuple[int, str], int] = {}
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(_SAMPLE_S):
            self._sample()
        self._sample()

    def stop(self) -> float:
        self._stopped.set()
        self.join()
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def _sample(self) -> None:
        parents: dict[int, int] = {}
        ticks: dict[int, tuple[str, int]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            pid = int(path.parent.name)
            parents[pid] = int(fields[1])
            ticks[pid] = fields[19], int(fields[11]) + int(fields[12])
        for pid, (born, used) in ticks.items():
            if _descends(pid, parents, os.getpid()) and pid not in self.excepted:
                self._ticks[pid, born] = used


def _descends(pid: int, parents: Mapping[int, int], ancestor: int) -> bool:
    while pid not in (0, ancestor):
        pid = parents.get(pid, 0)
    return pid == ancestor


def _end_children(excepted: set[int]) -> None:
    """End and reap every child but those ``excepted``, and whatever they leave behind."""
    deadline = time.monotonic() + 5
    while left := _children() - excepted:
        for pid in left:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _children() -> set[int]:
    return {int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}
