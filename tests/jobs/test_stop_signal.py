"""The word that ends a run in order: from the process's signals, through Ray's control plane, to the workers."""

import os
import signal
import threading
import time

import pytest

from jobs.cluster import ClusterInfo
from jobs.stop_signal import Interrupts, Listener, StopSignal, forget_signals


@pytest.mark.ray
def test_a_listener_hears_its_own_signal_only(ray_cluster: ClusterInfo) -> None:
    mine, other = StopSignal.of_run("runs/a"), StopSignal.of_run("runs/a")
    with Listener(mine) as listener:
        other.ask()
        time.sleep(0.5)
        assert not listener.heard()
        mine.ask()
        ends_at = time.monotonic() + 10
        while not listener.heard() and time.monotonic() < ends_at:
            time.sleep(0.02)
        assert listener.heard()
    other.forget()
    mine.forget()
    assert not mine.asked()


@pytest.mark.ray
def test_workers_are_known_by_rank(ray_cluster: ClusterInfo) -> None:
    joined, elsewhere = StopSignal.of_run("runs/a"), StopSignal.of_run("runs/b")
    elsewhere.join(0, "node-c")
    joined.join(0, "node-a")
    joined.join(11, "node-b")
    assert joined.workers() == {0: ("node-a", os.getpid()), 11: ("node-b", os.getpid())}
    forget_signals("runs/a")  # as the driver does that follows one that was killed
    assert (joined.workers(), elsewhere.workers()) == ({}, {0: ("node-c", os.getpid())})
    elsewhere.forget()
    assert elsewhere.workers() == {}


def test_a_listener_outlives_a_control_plane_that_is_away() -> None:
    answers: list[bool | Exception] = [ConnectionError("no control plane"), RuntimeError("still none"), False, True]

    class Away(StopSignal):
        def asked(self) -> bool:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    with Listener(Away("key")) as listener:
        ends_at = time.monotonic() + 10
        while not listener.heard() and time.monotonic() < ends_at:
            time.sleep(0.02)
        assert listener.heard()
    assert answers == []


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_noted_and_a_second_interrupt_quits(first: signal.Signals) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    interrupts = Interrupts()
    with interrupts.catching():
        os.kill(os.getpid(), first)
        assert interrupts.name == first.name
        os.kill(os.getpid(), signal.SIGTERM)  # a supervisor may well repeat itself
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.name == first.name
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_elsewhere_than_in_the_main_thread_nothing_is_caught() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen: list[object] = []

    def run() -> None:
        with Interrupts().catching():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
