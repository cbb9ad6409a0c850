"""Whose turn it is: connections and rate of each registered domain, and the requests of the worker in all."""

import asyncio
import contextlib
import itertools
import uuid
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable

import aiohttp

from pipelines.budget import Budget
from pipelines.connections import close_idle
from pipelines.fetch_config import FetchConfig
from pipelines.rate_leases import RENEWALS_PER_LEASE, Lease, LeaseClient

_MOST_DOMAINS = 10_000
_MOST_IDLE_DOMAINS = 64
_LONGEST_SLEEP_S = 1.0
_RECHECK_S = 0.1


class Share:
    """What this worker may take of one domain, and the session whose connections go there."""

    def __init__(self, session: aiohttp.ClientSession, connections: int, requests_per_second: float) -> None:
        self.session = session
        self.connections = Budget(connections)
        self.interval_s = 1 / requests_per_second
        self.started_at = self.paused_until = float("-inf")
        self.valid_until = float("inf")
        self.running = self.users = 0
        self.keeper: asyncio.Task[None] | None = None

    def pause(self, seconds: float) -> None:
        """Start nothing for a while: a host of the domain asked for it."""
        self.paused_until = max(self.paused_until, asyncio.get_running_loop().time() + seconds)

    def wait_s(self, now: float) -> float:
        """Seconds until the next request may start."""
        if now >= self.valid_until or self.running >= self.connections.limit:  # a lease has ended or shrunk
            return _RECHECK_S
        return max(self.started_at + self.interval_s, self.paused_until) - now


class DomainSlots:
    """Shares of all domains that one worker fetches from; used within one event loop.

    The limits hold in this worker alone, or, for a domain taken with ``leased=True``, over all workers that lease
    from ``leases``. A slow or busy domain holds up its own links only.
    """

    def __init__(
        self, config: FetchConfig, open_session: Callable[[], aiohttp.ClientSession], leases: LeaseClient | None
    ) -> None:
        self._config, self._open_session, self._leases = config, open_session, leases
        self._worker = Budget(config.concurrency_per_worker)
        self._session = open_session()
        self._shares: OrderedDict[tuple[str, bool], Share] = OrderedDict()
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._holders = map("{}-{}".format, itertools.repeat(uuid.uuid4().hex), itertools.count())
        self._keepers: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for keeper in self._keepers:
            if not keeper.cancelling():  # one that is about to give its lease back may finish
                keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        await self._session.close()

    @contextlib.asynccontextmanager
    async def connection(self, domain: str, leased: bool) -> AsyncIterator[Share]:
        """One of the domain's connections."""
        share = self._share(domain, leased)
        share.users += 1
        try:
            await share.connections.acquire()
            try:
                yield share
            finally:
                share.connections.release()
        finally:
            share.users -= 1
            if share.users == 0:
                await self._leave(domain, share)

    @contextlib.asynccontextmanager
    async def turn(self, share: Share) -> AsyncIterator[None]:
        """The moment at which a request may start, and one of the worker's slots until it has ended.

        No slot is held while the domain's rate makes it wait.
        """
        loop = asyncio.get_running_loop()
        while True:
            if share.connections.error is not None:  # there will be no lease any more
                raise share.connections.error
            wait_s = share.wait_s(loop.time())
            if wait_s > 0:
                await asyncio.sleep(min(wait_s, _LONGEST_SLEEP_S))
                continue
            await self._worker.acquire()
            if share.wait_s(loop.time()) <= 0:
                break
            self._worker.release()
        share.started_at = loop.time()
        share.running += 1
        try:
            yield
        finally:
            share.running -= 1
            self._worker.release()

    async def _leave(self, domain: str, share: Share) -> None:
        """Nobody uses the share for now: a lease is given back, of other domains a few stay connected."""
        if share.keeper is not None:
            del self._shares[domain, True]
            share.keeper.cancel()
            await asyncio.wait([share.keeper])  # the loop may stand still after the last link of a part
            return
        self._idle[domain] = None
        self._idle.move_to_end(domain)
        if len(self._idle) > _MOST_IDLE_DOMAINS:
            close_idle(self._session, self._idle.popitem(last=False)[0])

    def _share(self, domain: str, leased: bool) -> Share:
        key = (domain, leased and self._leases is not None)
        share = self._shares.get(key)
        if share is None:
            self._forget_idle()
            share = self._shares[key] = self._leased_share(domain) if key[1] else self._own_share()
        self._shares.move_to_end(key)
        self._idle.pop(domain, None)
        return share

    def _own_share(self) -> Share:
        return Share(self._session, self._config.connections_per_domain, self._config.requests_per_second_per_domain)

    def _leased_share(self, domain: str) -> Share:
        # A session of its own: idle connections go with the lease, for others to open theirs.
        share = Share(self._open_session(), 0, self._config.requests_per_second_per_domain)
        share.valid_until = float("-inf")
        share.keeper = asyncio.create_task(self._keep(domain, share))
        self._keepers.add(share.keeper)
        share.keeper.add_done_callback(self._keepers.discard)
        return share

    def _forget_idle(self) -> None:
        now = asyncio.get_running_loop().time()
        while len(self._shares) >= _MOST_DOMAINS:
            key, oldest = next(iter(self._shares.items()))
            if oldest.users or oldest.wait_s(now) > 0:
                return
            del self._shares[key]

    async def _keep(self, domain: str, share: Share) -> None:
        """Hold a lease as long as the share is used, and set the share by it."""
        assert self._leases is not None
        holder = next(self._holders)
        try:
            await self._renew_for_ever(self._leases, domain, holder, share)
        except Exception as error:  # whoever waits for the share fails with it
            share.connections.fail(error)
        finally:
            await share.session.close()
            with contextlib.suppress(Exception):  # it ends by itself too
                async with asyncio.timeout(self._config.lease_s):
                    await self._leases.release(domain, holder)

    async def _renew_for_ever(self, leases: LeaseClient, domain: str, holder: str, share: Share) -> None:
        period_s = self._config.lease_s / RENEWALS_PER_LEASE
        lease: Lease | None = None
        while True:
            asked_at = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(period_s):
                    if lease is None:
                        lease = await leases.acquire(domain, holder)
                    else:
                        # What the book is told to be in use may not grow meanwhile, and nothing else be open.
                        share.connections.resize(share.connections.used)
                        close_idle(share.session)
                        lease = await leases.renew(domain, holder, share.connections.used)
            except TimeoutError:
                lease = None
            if lease is not None:
                share.interval_s = 1 / lease.requests_per_second
            share.valid_until = asked_at + lease.lasts_s if lease else float("-inf")
            share.connections.resize(lease.connections if lease else 0)
            await asyncio.sleep(period_s if lease else min(period_s, 0.25))
