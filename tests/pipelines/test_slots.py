"""Politeness as a server sees it: connections and rate of a domain, in one worker and over several that lease."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pipelines import slots
from pipelines.fetch import Fetched, Fetcher
from pipelines.fetch_config import FetchConfig
from pipelines.rate_leases import Lease, LeaseBook


class Server:
    """Answers after ``delay_s``; writes down when requests come and how many connections are open."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.times: dict[str, list[float]] = {}
        self.open = self.most_open = self.accepted = 0

    @asynccontextmanager
    async def serve(self, host: str = "127.0.0.1") -> AsyncIterator[str]:
        server = await asyncio.start_server(self._connection, host, 0)
        try:
            yield f"http://{host}:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        self.accepted += 1
        self.most_open = max(self.most_open, self.open)
        try:
            while True:
                path = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1].decode()
                self.times.setdefault(path.partition("?")[0], []).append(time.monotonic())
                await asyncio.sleep(self.delay_s)
                if path.startswith("/to/"):
                    writer.write(f"HTTP/1.1 302 X\r\nContent-Length: 0\r\nLocation: {path[4:]}\r\n\r\n".encode())
                else:
                    writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 4\r\n\r\nbody")
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    def most_in(self, seconds: float) -> int:
        times = sorted(moment for moments in self.times.values() for moment in moments)
        return max(sum(start <= moment < start + seconds for moment in times) for start in times)


class BookLeases:
    """The client over a book in this process."""

    def __init__(self, book: LeaseBook) -> None:
        self.book = book
        self.given: list[Lease] = []
        self.tenures: set[str] = set()

    async def acquire(self, domain: str, holder: str) -> Lease | None:
        await asyncio.sleep(0.001)
        self.tenures.add(holder)
        lease = self.book.acquire(domain, holder, time.monotonic())
        self.given += [lease] if lease else []
        return lease

    async def renew(self, domain: str, holder: str, connections_in_use: int) -> Lease | None:
        await asyncio.sleep(0.001)
        return self.book.renew(domain, holder, connections_in_use, time.monotonic())

    async def release(self, domain: str, holder: str) -> None:
        self.book.release(domain, holder, time.monotonic())


async def keep(body: bytes) -> bytes:
    return body


def config(**settings: Any) -> FetchConfig:
    values = {"allow_networks": ("127.0.0.0/8",), "robots_txt": False, "retries": 0, "lease_s": 0.8} | settings
    return FetchConfig(**values)


def fetcher(leases: Any = None, **settings: Any) -> Fetcher[bytes]:
    return Fetcher(config(**settings), 1000, keep, leases)


def urls(base: str, count: int) -> list[str]:
    return [f"{base}/{number}" for number in range(count)]


def test_connections_and_rate_hold_in_one_worker() -> None:
    async def run() -> Server:
        server = Server(delay_s=0.1)
        limits = {"connections_per_domain": 3, "requests_per_second_per_domain": 40, "robots_txt": True}
        async with server.serve() as base, fetcher(**limits) as one:
            got = await asyncio.gather(*map(one.fetch, urls(base, 30)))
            assert all(each.result == b"body" for each in got)
            await one.fetch(f"{base}/30")  # the rate is remembered when nobody waits
            await one.fetch(f"{base}/31")
        return server

    server = asyncio.run(run())
    assert server.most_open == 3
    assert server.most_in(0.5) <= 0.5 * 40 + 2
    assert len(server.times["/robots.txt"]) == 1


def test_few_idle_connections_are_kept_however_many_hosts_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_MOST_IDLE_DOMAINS", 3)

    async def run() -> None:
        server = Server()
        async with server.serve("0.0.0.0") as base, fetcher() as one:
            port = base.rpartition(":")[2]
            for number in (*range(1, 11), 10, 10, 9):
                assert (await one.fetch(f"http://127.0.0.{number}:{port}/{number}")).result == b"body"
            await asyncio.sleep(0.05)
            assert server.open == 3
        assert server.accepted == 10  # the last hosts were asked again over the same connections

    asyncio.run(run())


def test_workers_that_lease_keep_the_limits_together() -> None:
    async def run() -> tuple[Server, BookLeases]:
        server = Server(delay_s=0.03)
        leases = BookLeases(LeaseBook(4, 60, lasts_s=0.8, drain_s=1.0))
        limits = {"connections_per_domain": 4, "requests_per_second_per_domain": 60}
        async with (
            server.serve() as base,
            fetcher(leases, **limits) as one,
            fetcher(leases, **limits) as two,
            fetcher(leases, **limits) as three,
        ):
            jobs = [each.fetch(url, leased=True) for each in (one, two, three) for url in urls(base, 30)]
            got = await asyncio.gather(*jobs)
            assert all(each.result == b"body" for each in got)
            held = leases.book.held("127.0.0.1", time.monotonic() + 1)
            assert held == (0, 0)  # given back before the last link's end is told, as the loop may then stand still
        return server, leases

    server, leases = asyncio.run(run())
    assert len(leases.tenures) == 3
    assert server.most_open <= 4
    assert server.most_in(0.5) <= 0.5 * 60 + 3  # a request may take a moment longer or shorter to arrive
    assert leases.book.prune(time.monotonic() + 1) == 0  # all was given back


def test_a_redirect_to_another_domain_takes_its_turn_there() -> None:
    async def run() -> tuple[Server, BookLeases]:
        front, back = Server(), Server(delay_s=0.05)
        leases = BookLeases(LeaseBook(2, 1000, lasts_s=0.8, drain_s=1.0))
        async with front.serve() as base, back.serve("127.0.0.2") as target, fetcher(leases) as one:
            got = await asyncio.gather(*(one.fetch(f"{base}/to/{target}/{number}") for number in range(8)))
            assert all((each.result, each.requests) == (b"body", 2) for each in got)
        return back, leases

    back, leases = asyncio.run(run())
    assert back.most_open == 2
    assert len(leases.given) >= 1


def test_a_slow_domain_holds_no_slot_of_the_worker_while_it_waits() -> None:
    async def run() -> float:
        slow, fast = Server(), Server()
        limits = {"concurrency_per_worker": 2, "requests_per_second_per_domain": 10, "connections_per_domain": 4}
        async with slow.serve() as one, fast.serve("127.0.0.2") as two, fetcher(**limits) as worker:
            waiting = [asyncio.create_task(worker.fetch(url)) for url in urls(one, 8)]
            await asyncio.sleep(0.05)
            started = time.monotonic()
            await worker.fetch(f"{two}/a")
            took = time.monotonic() - started
            await asyncio.gather(*waiting)
            return took

    assert asyncio.run(run()) < 0.2


def test_a_wait_for_a_turn_is_not_part_of_the_deadline() -> None:
    async def run() -> list[Fetched[bytes]]:
        server = Server()
        async with server.serve() as base, fetcher(requests_per_second_per_domain=5, timeout_s=0.3) as one:
            return list(await asyncio.gather(*map(one.fetch, urls(base, 5))))

    assert [each.reason for each in asyncio.run(run())] == [None] * 5


def test_a_share_that_nobody_gives_any_more_stops_new_requests() -> None:
    async def run() -> None:
        server, leases = Server(), BookLeases(LeaseBook(4, 1000, lasts_s=0.4, drain_s=1.0))
        async with server.serve() as base, fetcher(leases, lease_s=0.4) as one:
            first = [one.fetch(url, leased=True) for url in urls(base, 3)]
            server.delay_s = 0.5
            tasks = [asyncio.create_task(job) for job in first]
            await asyncio.sleep(0.15)

            async def silent(*_: Any) -> None:
                await asyncio.sleep(3600)

            leases.renew = leases.acquire = silent  # type: ignore[method-assign, assignment]
            await asyncio.gather(*tasks)
            await asyncio.sleep(0.1)
            late = asyncio.create_task(one.fetch(f"{base}/late", leased=True))
            await asyncio.sleep(0.5)
            assert not late.done()
            assert "/late" not in server.times
            late.cancel()
            await asyncio.gather(late, return_exceptions=True)

    asyncio.run(run())


def test_who_has_a_connection_and_waits_for_its_turn_hears_of_the_error_too() -> None:
    async def run() -> None:
        server, leases = Server(), BookLeases(LeaseBook(4, 0.2, lasts_s=0.4, drain_s=0.0))

        async def broken(*_: Any) -> None:
            raise RuntimeError("actor gone")

        leases.renew = broken  # type: ignore[method-assign, assignment]
        async with server.serve() as base, fetcher(leases, lease_s=0.4) as one:
            jobs = [asyncio.create_task(one.fetch(url, leased=True)) for url in urls(base, 3)]
            first, *others = await asyncio.gather(*jobs, return_exceptions=True)
        assert isinstance(first, Fetched)
        assert [str(error) for error in others] == ["actor gone"] * 2

    asyncio.run(run())


@pytest.mark.parametrize("leased", [True, False])
def test_an_error_of_the_leases_reaches_who_needs_them(leased: bool) -> None:
    class Broken:
        async def acquire(self, domain: str, holder: str) -> Lease | None:
            raise RuntimeError("actor gone")

        renew: Callable[..., Any] = acquire
        release: Callable[..., Any] = acquire

    async def run() -> Fetched[bytes]:
        server = Server()
        async with server.serve() as base, fetcher(Broken()) as one:
            return await one.fetch(f"{base}/a", leased=leased)

    if leased:
        with pytest.raises(RuntimeError, match="actor gone"):
            asyncio.run(run())
    else:
        assert asyncio.run(run()).result == b"body"
