"""Guarded keep-alive connections: who we say we are, how names become addresses, and what is never connected to."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from coca.addresses import parse_networks, socket_factory
from coca.code_version import code_version
from pipelines.domains import registered_domain
from pipelines.fetch_config import FetchConfig

AGENT = "coca"


def user_agent(contact: str) -> str:
    """Who asks, honestly: name, version and, where configured, whom to write to."""
    name = f"{AGENT}/{code_version().partition('+')[0]}"
    return f"{name} (+{contact})" if contact else name


class Connections:
    """Sessions over one resolver."""

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._networks = parse_networks(config.allow_networks)
        self._resolver = Resolver(config.dns_threads, config.dns_cache_s)

    def open_session(self) -> aiohttp.ClientSession:
        """Keep-alive connections of their own, closed with the session. A request tells its ``Tally`` as
        ``trace_request_ctx``."""
        config = self._config
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(_count_request)
        session = aiohttp.ClientSession(
            connector=_Connector(
                limit=0,  # the slots are the limit: a wait for one is not part of an attempt's time
                resolver=self._resolver,
                use_dns_cache=False,  # the resolver has one
                socket_factory=socket_factory(self._networks),
                keepalive_timeout=10,
            ),
            headers={
                "User-Agent": user_agent(config.contact),
                "Accept": "image/webp,image/png,image/jpeg,image/*;q=0.8",
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # one deadline of ours around the whole attempt
            auto_decompress=False,
            trust_env=False,
            read_bufsize=64 * 1024,
            max_line_size=config.max_header_bytes,
            max_field_size=config.max_header_bytes,
            trace_configs=[trace],
        )
        # aiohttp would ask a host that hangs up a second time at once, past its rate and past our backoff.
        session._retry_connection = False
        return session

    async def close(self) -> None:
        await self._resolver.close()


class _Connector(aiohttp.TCPConnector):
    def close_idle(self, domain: str | None) -> None:
        for key in [key for key in self._conns if domain is None or registered_domain(key.host) == domain]:
            for protocol, _ in self._conns.pop(key):
                protocol.close()


def close_idle(session: aiohttp.ClientSession, domain: str | None = None) -> None:
    """Close the connections of ``Connections.open_session`` that carry no request, of one registered domain or all."""
    assert isinstance(session.connector, _Connector)
    session.connector.close_idle(domain)


class Resolver(AbstractResolver):
    """Names to addresses in threads of its own; one lookup for all who ask at once, failures remembered like answers.

    What it answers is not trusted: each address is checked again on the socket that is about to connect.
    """

    _MOST_NAMES = 100_000

    def __init__(self, threads: int, cache_s: float) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="dns")
        self._cache_s = cache_s
        self._known: dict[tuple[str, int], tuple[float, asyncio.Future[list[ResolveResult]]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        loop = asyncio.get_running_loop()
        ends_at, lookup = self._known.get((host, port), (0.0, None))
        if lookup is None or (lookup.done() and ends_at <= loop.time()):
            if len(self._known) >= self._MOST_NAMES:
                self._known.clear()
            lookup = loop.run_in_executor(self._threads, _look_up, host, port, family)
            lookup.add_done_callback(lambda done: done.cancelled() or done.exception())  # who asked may be gone
            self._known[host, port] = (loop.time() + self._cache_s, lookup)
        return await asyncio.shield(lookup)  # the others wait for it too

    async def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(host: str, port: int, family: int) -> list[ResolveResult]:
    found = socket.getaddrinfo(host, port, family=family, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    return [
        ResolveResult(
            hostname=host,
            host=str(address[0]),
            port=port,
            family=kind,
            proto=protocol,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
        )
        for kind, _, protocol, _, address in found
    ]


async def _count_request(_: aiohttp.ClientSession, context: Any, __: Any) -> None:
    context.trace_request_ctx.requests += 1
