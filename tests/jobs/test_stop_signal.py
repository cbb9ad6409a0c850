"""The word that ends a run in order: from the process's signals, through Ray's control plane, to the workers."""

import os
import signal
import threading
import time

import pytest

from jobs.cluster import ClusterInfo
from jobs.stop_signal import Interrupts, Listener, StopSignal


@pytest.mark.ray
def test_a_listener_hears_its_own_signal_only(ray_cluster: ClusterInfo) -> None:
    mine, other = StopSignal(), StopSignal()
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
    joined = StopSignal()
    joined.join(0, "node-a")
    joined.join(11, "node-b")
    assert joined.workers() == {0: ("node-a", os.getpid()), 11: ("node-b", os.getpid())}
    joined.forget()
    assert joined.workers() == {}


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
