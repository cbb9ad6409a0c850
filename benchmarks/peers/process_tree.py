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
_SAMPLE_S, _MEMORY_SAMPLE_S = 0.1, 0.5


@dataclass(frozen=True)
class Cost:
    """Wall-clock and CPU seconds, and memory."""

    seconds: float
    cpu_seconds: float
    peak_pss_mb: float
    """Highest sum over the processes of their proportional set sizes; 0 where it was not asked for."""


def run(command: Sequence[str], log: Path, environment: Mapping[str, str], *, memory: bool = False) -> Cost:
    """Run to the end. Descendants that outlive the command become ours; they are counted and ended.

    CPU time is what each process had taken when it was last seen: the sum that the kernel hands to parents misses those
    whose parent ignores its children, as Ray's does.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
    meter = _Meter(excepted={os.getpid()} | _children(), memory=memory)
    started = time.monotonic()
    with log.open("wb") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, env=dict(environment)).returncode
    seconds = time.monotonic() - started
    cpu_seconds = meter.stop()
    _end_children(meter.excepted)
    if code:
        sys.exit(f"error: exit code {code} of {' '.join(command[:4])} ...:\n{log.read_text(errors='replace')[-3000:]}")
    return Cost(seconds, cpu_seconds, meter.peak_pss_kb / 1024)


class _Meter(threading.Thread):
    """Reads /proc over and over: CPU seconds by (pid, start) of every descendant of ours."""

    def __init__(self, excepted: set[int], *, memory: bool) -> None:
        super().__init__(daemon=True)
        self.excepted, self._memory = excepted, memory
        self.peak_pss_kb = 0
        self._stopped = threading.Event()
        self._ticks: dict[tuple[int, str], int] = {}
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(_MEMORY_SAMPLE_S if self._memory else _SAMPLE_S):
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
        ours = [pid for pid in ticks if _descends(pid, parents, os.getpid()) and pid not in self.excepted]
        for pid in ours:
            born, used = ticks[pid]
            self._ticks[pid, born] = used
        if self._memory:
            self.peak_pss_kb = max(self.peak_pss_kb, sum(map(_pss_kb, ours)))


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


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
