"""A circuit breaker for hosts: who failed again and again is left alone for a while."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_MOST_HOSTS = 100_000


@dataclass
class _Failures:
    count: int = 0
    open_until: float = 0.0


class CircuitBreaker:
    """Opens for ``open_s`` after ``threshold`` failures of a host in a row; then one probe decides what follows.

    Hosts without failures take no memory; of more than 100,000 failing ones the longest known are forgotten.
    """

    def __init__(self, threshold: int, open_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._threshold, self._open_s, self._clock = threshold, open_s, clock
        self._failures: OrderedDict[str, _Failures] = OrderedDict()

    def allows(self, host: str) -> bool:
        """Whether ``host`` may be asked now. Where it is on probation, the first to ask is the probe."""
        failures = self._failures.get(host)
        if failures is None or failures.count < self._threshold:
            return True
        now = self._clock()
        if now < failures.open_until:
            return False
        failures.open_until = now + self._open_s  # for all but this probe, whose end may never be told
        return True

    def failed(self, host: str) -> None:
        """No connection, no answer in time, or one far too slow."""
        failures = self._failures.setdefault(host, _Failures())
        failures.count += 1
        failures.open_until = self._clock() + self._open_s
        if len(self._failures) > _MOST_HOSTS:
            self._failures.popitem(last=False)

    def answered(self, host: str) -> None:
        self._failures.pop(host, None)
