"""Shares of a domain's limits for the workers of a job: leases that end by themselves where their holder dies.

docs/decisions/0020-rate-leases.md says why it is built so.
"""

import time
import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

RENEWALS_PER_LEASE = 4


@dataclass(frozen=True)
class Lease:
    """A share of a domain's limits, from the moment it was asked for."""

    connections: int
    requests_per_second: float
    lasts_s: float
    """Renew it earlier; after that nothing may be started."""


class LeaseClient(Protocol):
    """Where a worker gets its shares. ``holder`` names one tenure of one worker and is never used again."""

    async def acquire(self, domain: str, holder: str) -> Lease | None:
        """A share, or None where nothing is free yet: ask again, others make room at their next renewal."""
        ...

    async def renew(self, domain: str, holder: str, connections_in_use: int) -> Lease | None:
        """The share from now on, which may be another; None where it has ended."""
        ...

    async def release(self, domain: str, holder: str) -> None: ...


@dataclass
class _Holder:
    connections: int
    """Counted against the limit: the share, or what was still in use above it when it shrank."""
    rate: float
    """Counted against the limit: the share, or the one before until its holder is known to have heard."""
    rate_told: float
    expires_at: float


@dataclass
class _Domain:
    holders: dict[str, _Holder] = field(default_factory=dict)  # in the order they came
    waiting: dict[str, float] = field(default_factory=dict)  # who found nothing free, and until when that counts
    cooling: dict[str, _Holder] = field(default_factory=dict)  # gone, but their last request was a moment ago


class LeaseBook:
    """Who holds what of which domain. Every time is handed in, in seconds of one clock that never goes back.

    What is counted as held of a domain is never more than ``connections`` and ``requests_per_second`` in sum. A holder
    that is not heard of again keeps its share for ``lasts_s + drain_s``: the time in which it may start requests, and
    the longest that one of them takes.
    """

    def __init__(
        self,
        connections: int,
        requests_per_second: float,
        lasts_s: float,
        drain_s: float = 0.0,
        opens_at: float = float("-inf"),
    ) -> None:
        self._connections, self._rate = connections, requests_per_second
        self._lasts_s, self._drain_s, self._opens_at = lasts_s, drain_s, opens_at
        self._domains: dict[str, _Domain] = {}

    def acquire(self, domain: str, holder: str, now: float) -> Lease | None:
        """A fair share of what is free; None, and a place among those who wait, where that is too little."""
        if now < self._opens_at:
            return None
        book = self._current(domain, now)
        if holder in book.holders:
            return self._grant(book, holder, book.holders[holder].connections, now)
        book.waiting[holder] = now + self._lasts_s
        lease = self._grant(book, holder, 0, now)
        if lease is not None:
            del book.waiting[holder]
        return lease

    def renew(self, domain: str, holder: str, connections_in_use: int, now: float) -> Lease | None:
        """The share from now on; None for a lease that has ended."""
        book = self._current(domain, now)
        if holder not in book.holders:
            return None
        return self._grant(book, holder, connections_in_use, now)

    def release(self, domain: str, holder: str, now: float) -> None:
        """Connections are free at once, the rate when another request of this holder would have been due."""
        book = self._current(domain, now)
        book.waiting.pop(holder, None)
        left = book.holders.pop(holder, None)
        if left is not None:
            left.connections, left.expires_at = 0, now + 1 / left.rate
            book.cooling[holder] = left

    def held(self, domain: str, now: float) -> tuple[int, float]:
        """Connections and requests per second of ``domain`` that are out."""
        return _sum(self._current(domain, now))

    def prune(self, now: float) -> int:
        """Forget domains that nobody holds or waits for; how many are left."""
        for domain in list(self._domains):
            book = self._current(domain, now)
            if not (book.holders or book.waiting or book.cooling):
                del self._domains[domain]
        return len(self._domains)

    def _grant(self, book: _Domain, holder: str, in_use: int, now: float) -> Lease | None:
        others_connections, others_rate = _sum(book, besides=holder)
        known = book.holders.get(holder)
        parties = len(book.holders.keys() | book.waiting.keys())
        shares = min(parties, self._connections)
        place = list(book.holders).index(holder) if known else len(book.holders)
        fair_connections = self._connections // shares + (place < self._connections % shares)
        fair_rate = self._rate / shares
        connections = min(fair_connections, self._connections - others_connections)
        rate = min(fair_rate, self._rate - others_rate)
        # A sliver of the rate would bind a newcomer to hour-long waits; it rather waits for its share.
        if known is None and (connections < 1 or rate < fair_rate / 2):
            return None
        book.holders[holder] = _Holder(
            connections=max(connections, min(in_use, known.connections)) if known else connections,
            rate=max(rate, known.rate_told) if known else rate,
            rate_told=rate,
            expires_at=now + self._lasts_s + self._drain_s,
        )
        return Lease(connections, rate, self._lasts_s)

    def _current(self, domain: str, now: float) -> _Domain:
        """The domain without what has expired by ``now``."""
        book = self._domains.setdefault(domain, _Domain())
        for entries in (book.holders, book.cooling):
            for name in [name for name, entry in entries.items() if entry.expires_at <= now]:
                del entries[name]
        for name in [name for name, until in book.waiting.items() if until <= now]:
            del book.waiting[name]
        return book


def _sum(book: _Domain, besides: str | None = None) -> tuple[int, float]:
    out = [entry for name, entry in book.holders.items() if name != besides] + list(book.cooling.values())
    return sum(entry.connections for entry in out), sum(entry.rate for entry in out)


class RateLeases:
    """The actor around the book: one for a job, started by ``start_rate_leases``."""

    _PRUNE_EVERY = 10_000

    def __init__(
        self,
        connections: int,
        requests_per_second: float,
        lasts_s: float,
        drain_s: float,
        restarted: bool | None = None,
    ) -> None:
        if restarted is None:
            import ray

            with warnings.catch_warnings():  # Ray's own property asks by a name that Ray has deprecated
                warnings.simplefilter("ignore")
                restarted = ray.get_runtime_context().was_current_actor_reconstructed
        # A book that was lost may have had leases out: nothing is granted until the last of them has ended.
        opens_at = time.monotonic() + lasts_s + drain_s if restarted else float("-inf")
        self._book = LeaseBook(connections, requests_per_second, lasts_s, drain_s, opens_at)
        self._calls = 0

    def acquire(self, domain: str, holder: str) -> Lease | None:
        self._calls += 1
        if self._calls % self._PRUNE_EVERY == 0:
            self._book.prune(time.monotonic())
        return self._book.acquire(domain, holder, time.monotonic())

    def renew(self, domain: str, holder: str, connections_in_use: int) -> Lease | None:
        return self._book.renew(domain, holder, connections_in_use, time.monotonic())

    def release(self, domain: str, holder: str) -> None:
        self._book.release(domain, holder, time.monotonic())


class RayLeases:
    """A ``LeaseClient`` over the actor; it travels to the workers by pickle."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def acquire(self, domain: str, holder: str) -> Lease | None:
        return await self._actor.acquire.remote(domain, holder)

    async def renew(self, domain: str, holder: str, connections_in_use: int) -> Lease | None:
        return await self._actor.renew.remote(domain, holder, connections_in_use)

    async def release(self, domain: str, holder: str) -> None:
        await self._actor.release.remote(domain, holder)


def start_rate_leases(connections: int, requests_per_second: float, lasts_s: float, drain_s: float) -> RayLeases:
    """The job's book in an actor without CPUs of its own, restarted where its node dies.

    It ends when the last client that came from here is gone. ``drain_s`` is the longest time an attempt takes.
    """
    import ray

    actor = ray.remote(RateLeases).options(num_cpus=0, max_restarts=-1, max_task_retries=-1)
    return RayLeases(actor.remote(connections, requests_per_second, lasts_s, drain_s))
