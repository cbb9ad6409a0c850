"""Fetching urls from hosts that may be slow, hostile or gone: retries, politeness and opt-outs around each request."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Generic, Self, TypeVar
from urllib.parse import urlsplit

from coca.contract import Reason
from pipelines.breaker import CircuitBreaker
from pipelines.budget import Budget
from pipelines.connections import AGENT, Connections
from pipelines.domains import registered_domain
from pipelines.fetch_config import FetchConfig
from pipelines.rate_leases import LeaseClient
from pipelines.request import Answer, BodyRule, Clock, Requester, Tally, Validators
from pipelines.robots import MAX_ROBOTS_BYTES, RobotsCache, RobotsFile
from pipelines.slots import DomainSlots, Share

if TYPE_CHECKING:
    from pipelines.img2dataset_engine import Img2datasetFetcher

__all__ = ["Fetched", "Fetcher", "Validators", "create_fetcher"]

T = TypeVar("T")

_MAY_PASS = frozenset(
    {
        Reason.RATE_LIMITED,
        Reason.SERVER_ERROR,
        Reason.TIMEOUT,
        Reason.CONNECT_ERROR,
        Reason.DNS_FAILURE,
        Reason.BODY_INCOMPLETE,
    }
)
_HOST_FAILURES = frozenset({Reason.CONNECT_ERROR, Reason.DNS_FAILURE, Reason.TIMEOUT, Reason.TOO_SLOW})
# RFC 9309, section 2.3.1: no such file, or redirects without end, and everything is allowed.
_NO_ROBOTS = frozenset({Reason.NOT_FOUND, Reason.CLIENT_ERROR, Reason.TOO_MANY_REDIRECTS})


@dataclass(frozen=True)
class Fetched(Generic[T]):
    """How a url ended: ``result`` of the handler, ``not_modified``, or a ``reason``."""

    reason: Reason | None = None
    result: T | None = None
    status: int | None = None
    """Of the last answer."""
    requests: int = 0
    """HTTP requests sent for this url, retries and redirects included; those for a robots.txt serve many urls."""
    bytes: int = 0
    """Body bytes received."""
    etag: str | None = None
    last_modified: str | None = None
    retry_after_s: float | None = None
    """What the last answer asked for."""
    not_modified: bool = False
    """A conditional request was answered with 304."""


@dataclass(frozen=True)
class _Link:
    """What is asked for, and how."""

    url: str
    rule: BodyRule
    validators: Validators | None
    leased: bool
    obeys_robots: bool


class Fetcher(Generic[T]):
    """Connections, slots, budgets and what is known of hosts, for one worker; used within one event loop.

    ``await handle(body)`` gets each body as it arrives; its bytes count as in flight until it returns.
    Bodies over ``max_bytes`` or under ``min_bytes`` are refused.
    """

    def __init__(
        self,
        config: FetchConfig,
        max_bytes: int,
        handle: Callable[[bytes], Awaitable[T]],
        leases: LeaseClient | None = None,
        min_bytes: int = 0,
    ) -> None:
        self.config, self._handle, self._leases = config, handle, leases
        self._rule = BodyRule(max_bytes, min_bytes)
        self._budget = Budget(config.max_bytes_in_flight)
        self._breaker = CircuitBreaker(config.breaker_failures, config.breaker_open_s)
        self._robots = RobotsCache(AGENT, config.robots_txt_lifetime_s, config.breaker_open_s)
        self._random = random.Random()

    async def __aenter__(self) -> Self:
        self._connections = Connections(self.config)
        self._requester = Requester(self.config, self._budget)
        self._slots = DomainSlots(self.config, self._connections.open_session, self._leases)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._slots.close()
        await self._connections.close()

    async def fetch(self, url: str, *, validators: Validators | None = None, leased: bool = False) -> Fetched[T]:
        """Fetch a canonical url, with retries where the failure may pass.

        ``leased``: other workers fetch from its registered domain too, so a share of its limits is leased first.
        """
        tally = Tally()
        link = _Link(url, self._rule, validators, leased, self.config.robots_txt)
        answer = await self._answer(link, tally)
        return Fetched(
            answer.reason,
            await self._run_handler(answer),
            answer.status,
            tally.requests,
            tally.bytes,
            answer.etag,
            answer.last_modified,
            answer.retry_after_s,
            answer.not_modified,
        )

    async def _run_handler(self, answer: Answer) -> T | None:
        if answer.body is None:
            return None
        try:
            return await self._handle(answer.body)
        finally:
            self._budget.release(answer.reserved)

    async def _answer(self, link: _Link, tally: Tally) -> Answer:
        """The answer after retries, between which no slot is held."""
        attempt = 0
        answer = await self._attempt(link, tally)
        while (wait_s := self._wait_before_retry(answer, attempt)) is not None:
            await asyncio.sleep(wait_s)
            attempt += 1
            again = await self._attempt(link, tally)
            if again.reason is Reason.HOST_UNAVAILABLE:  # not asked again: the last answer says more
                break
            answer = again
        return answer

    def _wait_before_retry(self, answer: Answer, attempt: int) -> float | None:
        """Seconds until the next attempt, None where this answer stands."""
        if answer.reason not in _MAY_PASS or answer.permanent or attempt == self.config.retries:
            return None
        asked_s = answer.retry_after_s or 0.0
        if asked_s > self.config.max_retry_after_s:
            return None
        backoff_s = min(self.config.backoff_s * 2**attempt, self.config.max_backoff_s)
        return max(asked_s, backoff_s * self._random.uniform(0.5, 1.5))

    async def _attempt(self, link: _Link, tally: Tally) -> Answer:
        """Follow redirects within one deadline; each target is checked, and waits for its turn, like the first url."""
        clock = Clock(self.config.timeout_s)
        url, home = link.url, _domain(link.url)
        answer = Answer()
        for _ in range(self.config.max_redirects + 1):
            # Who else fetches from the domain that a redirect leads to is not known here.
            leased = link.leased or _domain(url) != home
            if link.obeys_robots:
                refusal = await self._robots.refusal(url, partial(self._get_robots, leased))
                if refusal is not None:
                    return Answer(refusal, permanent=True)
            answer = await self._ask(url, leased, link, clock, tally)
            if answer.location is None:
                return answer
            url = answer.location
        return replace(answer, reason=Reason.TOO_MANY_REDIRECTS, location=None)

    async def _ask(self, url: str, leased: bool, link: _Link, clock: Clock, tally: Tally) -> Answer:
        host = urlsplit(url).netloc
        async with self._slots.connection(_domain(url), leased) as share:
            if not self._breaker.allows(host):
                return Answer(Reason.HOST_UNAVAILABLE)
            async with self._slots.turn(share):
                answer = await self._requester.get(share.session, url, link.rule, clock, tally, link.validators)
            self._learn(host, share, answer)
            return answer

    def _learn(self, host: str, share: Share, answer: Answer) -> None:
        """What an answer says about its host, for all its links."""
        asked_to_wait = answer.status in (429, 503) and answer.retry_after_s is not None
        if answer.retry_after_s is not None and asked_to_wait:
            share.pause(min(answer.retry_after_s, self.config.max_retry_after_s))
        if asked_to_wait or answer.reason is Reason.RATE_LIMITED or answer.reason in _HOST_FAILURES:
            self._breaker.failed(host)
        elif answer.status is not None:
            self._breaker.answered(host)

    async def _get_robots(self, leased: bool, url: str) -> RobotsFile:
        tally = Tally()
        rule = BodyRule(min(MAX_ROBOTS_BYTES, self.config.max_bytes_in_flight), cut=True, opt_outs=False)
        answer = await self._answer(_Link(url, rule, None, leased, obeys_robots=False), tally)
        if answer.body is not None:
            self._budget.release(answer.reserved)
            return RobotsFile(answer.body.decode("utf-8", "replace"))
        if answer.reason in _NO_ROBOTS:
            return RobotsFile()
        if answer.reason in _HOST_FAILURES:
            return RobotsFile(unreadable=answer.reason)
        if answer.reason in (Reason.FORBIDDEN_ADDRESS, Reason.INVALID_URL) and tally.requests == 0:
            return RobotsFile(unreadable=answer.reason)  # the host itself, not where a redirect led
        return RobotsFile(unreadable=Reason.HOST_UNAVAILABLE)


def create_fetcher(
    config: FetchConfig,
    max_bytes: int,
    handle: Callable[[bytes], Awaitable[T]],
    leases: LeaseClient | None = None,
    min_bytes: int = 0,
) -> "Fetcher[T] | Img2datasetFetcher[T]":
    """The fetcher of ``config.engine``.

    Raises:
        BadInput: the engine is not installed.
    """
    if config.engine == "img2dataset":
        from pipelines.img2dataset_engine import Img2datasetFetcher

        return Img2datasetFetcher(config, max_bytes, handle, leases, min_bytes)
    return Fetcher(config, max_bytes, handle, leases, min_bytes)


def _domain(url: str) -> str:
    return registered_domain(urlsplit(url).hostname or "")
