"""A hung process ends itself, with the place where it hung on stderr; one that beats is left alone."""

import re
import subprocess
import sys
import time

import pytest

from coca.watchdog import EXIT_HUNG, Watchdog

SCRIPT = """
import ctypes, sys, threading, time
from coca import watchdog
watchdog.GRACE_S = 0.3
def stuck_in_python():
    threading.Event().wait()
def stuck_in_native_code():
    ctypes.PyDLL(None).sleep(30)  # PyDLL keeps the interpreter's lock
with watchdog.Watchdog(0.2, "worker 3") as dog:
    for step in range(3):
        time.sleep(0.02)
        dog.beat()
    {hang}()
"""


def run(hang: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", SCRIPT.format(hang=hang)], capture_output=True, text=True, timeout=20, check=False
    )


def test_a_hang_prints_every_stack_and_ends_the_process() -> None:
    ended = run("stuck_in_python")
    assert ended.returncode == EXIT_HUNG
    assert re.search(r"worker 3 ended no step for \d\.\d s and ends itself", ended.stderr)
    assert "in stuck_in_python" in ended.stderr


def test_a_hang_that_holds_the_interpreter_ends_too() -> None:
    ended = run("stuck_in_native_code")
    assert ended.returncode == 1  # faulthandler's
    assert "in stuck_in_native_code" in ended.stderr


def test_a_worker_that_beats_lives_and_one_that_has_left_is_not_watched(capfd: pytest.CaptureFixture[str]) -> None:
    with open("/dev/null", "w") as nowhere, Watchdog(0.2, "worker", nowhere) as dog:
        time.sleep(0.4)  # the first step may take three times as long
        for _ in range(10):
            dog.beat()
            time.sleep(0.05)
    time.sleep(0.4)
    assert capfd.readouterr().err == ""
