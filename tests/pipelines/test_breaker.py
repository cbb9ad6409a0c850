"""The circuit breaker, by a clock of the test."""

import pytest

from pipelines import breaker
from pipelines.breaker import CircuitBreaker


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_it_opens_after_failures_in_a_row_and_for_that_host_only() -> None:
    circuit = CircuitBreaker(3, 60, Clock())
    for _ in range(2):
        circuit.failed("a")
    circuit.answered("a")
    for _ in range(2):
        circuit.failed("a")
    assert circuit.allows("a")
    circuit.failed("a")
    assert not circuit.allows("a")
    assert circuit.allows("b")


@pytest.mark.parametrize("recovers", [True, False])
def test_one_probe_decides(recovers: bool) -> None:
    clock = Clock()
    circuit = CircuitBreaker(1, 60, clock)
    circuit.failed("a")
    clock.now = 59.9
    assert not circuit.allows("a")
    clock.now = 60.0
    assert [circuit.allows("a") for _ in range(3)] == [True, False, False]
    clock.now = 61.0
    circuit.answered("a") if recovers else circuit.failed("a")
    assert circuit.allows("a") is recovers
    clock.now = 121.0
    assert circuit.allows("a")


def test_a_probe_of_which_nobody_hears_again_does_not_close_the_door_for_ever() -> None:
    clock = Clock()
    circuit = CircuitBreaker(1, 60, clock)
    circuit.failed("a")
    clock.now = 60.0
    assert circuit.allows("a")
    clock.now = 119.9
    assert not circuit.allows("a")
    clock.now = 120.0
    assert circuit.allows("a")


def test_the_longest_known_of_too_many_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "_MOST_HOSTS", 2)
    circuit = CircuitBreaker(1, 60, Clock())
    for host in "abc":
        circuit.failed(host)
    assert [circuit.allows(host) for host in "abc"] == [True, False, False]
