"""Fetching one url from a host that may be slow, hostile or gone: bounded in time, bytes, redirects and addresses."""

import asyncio
import contextlib
import email.utils
import random
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Self, TypeVar
from urllib.parse import urljoin, urlsplit

import aiohttp
from yarl import URL

from coca.addresses import ForbiddenAddress, parse_networks, socket_factory
from coca.code_version import code_version
from coca.contract import Reason, canonical_url
from pipelines.budget import ByteBudget
from pipelines.fetch_config import FetchConfig
from pipelines.opt_out import is_opted_out

T = TypeVar("T")

AGENT = "coca"
_REDIRECTS = (301, 302, 303, 307, 308)
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


@dataclass(frozen=True)
class Fetched(Generic[T]):
    """How a url ended: ``result`` of the handler, or a ``reason``."""

    reason: Reason | None = None
    result: T | None = None
    status: int | None = None
    """Of the last answer."""
    requests: int = 0
    """HTTP requests sent, retries and redirects included."""
    bytes: int = 0
    """Body bytes received."""
    etag: str | None = None
    last_modified: str | None = None
    retry_after_s: float | None = None
    """What the last answer asked for."""


@dataclass
class _Tally:
    requests: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Answer:
    """The end of one attempt. A body comes with bytes of the budget, which the receiver gives back."""

    reason: Reason | None = None
    body: bytes | None = None
    reserved: int = 0
    status: int | None = None
    etag: str | None = None
    last_modified: str | None = None
    retry_after_s: float | None = None
    permanent: bool = field(default=False)
    """Not worth another attempt, though its reason may pass later."""


def user_agent(contact: str) -> str:
    """Who asks, honestly: name, version and, where configured, whom to write to."""
    name = f"{AGENT}/{code_version().partition('+')[0]}"
    return f"{name} (+{contact})" if contact else name


class Fetcher(Generic[T]):
    """Keep-alive connections, slots and budgets of one worker; used within one event loop.

    ``handle(body)`` runs in a small thread pool as bodies arrive; the body is let go when it returns.
    """

    def __init__(self, config: FetchConfig, max_bytes: int, handle: Callable[[bytes], T]) -> None:
        self.config, self._max_bytes, self._handle = config, max_bytes, handle
        self._networks = parse_networks(config.allow_networks)
        self._threads = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._slots = asyncio.Semaphore(config.concurrency_per_worker)
        self._hosts: dict[str, _HostSlots] = {}
        self._budget = ByteBudget(config.max_bytes_in_flight)
        self._random = random.Random()

    async def __aenter__(self) -> Self:
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(_count_request)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=0,  # the slots are the limit: a wait for one is not part of an attempt's time
                ttl_dns_cache=300,
                socket_factory=socket_factory(self._networks),
            ),
            headers={
                "User-Agent": user_agent(self.config.contact),
                "Accept": "image/webp,image/png,image/jpeg,image/*;q=0.8",
                "Accept-Encoding": "identity",
            },
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=None),  # one deadline of ours around the whole attempt
            auto_decompress=False,
            trust_env=False,
            trace_configs=[trace],
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        self._threads.shutdown()

    async def fetch(self, url: str) -> Fetched[T]:
        """Fetch a canonical url, with retries where the failure may pass."""
        tally = _Tally()
        for attempt in range(self.config.retries + 1):
            async with self._slot(url):
                answer = await self._attempt(url, tally)
            wait_s = self._wait_before_retry(answer, attempt)
            if wait_s is None:
                break
            await asyncio.sleep(wait_s)
        result = await self._run_handler(answer)
        return Fetched(
            answer.reason,
            result,
            answer.status,
            tally.requests,
            tally.bytes,
            answer.etag,
            answer.last_modified,
            answer.retry_after_s,
        )

    @contextlib.asynccontextmanager
    async def _slot(self, url: str) -> AsyncIterator[None]:
        """First a slot of the host, then one of the worker: a slow host holds up itself, not the others."""
        host = urlsplit(url).hostname or ""
        slots = self._hosts.setdefault(host, _HostSlots(self.config.concurrency_per_host))
        slots.users += 1
        try:
            async with slots.semaphore, self._slots:
                yield
        finally:
            slots.users -= 1
            if slots.users == 0:
                del self._hosts[host]

    def _wait_before_retry(self, answer: _Answer, attempt: int) -> float | None:
        """Seconds until the next attempt, None where this answer stands."""
        if answer.reason not in _MAY_PASS or answer.permanent or attempt == self.config.retries:
            return None
        asked_s = answer.retry_after_s or 0.0
        if asked_s > self.config.max_retry_after_s:
            return None
        backoff_s = min(self.config.backoff_s * 2**attempt, self.config.max_backoff_s)
        return max(asked_s, backoff_s * self._random.uniform(0.5, 1.5))

    async def _run_handler(self, answer: _Answer) -> T | None:
        if answer.body is None:
            return None
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, self._handle, answer.body)
        finally:
            await self._budget.release(answer.reserved)

    async def _attempt(self, url: str, tally: _Tally) -> _Answer:
        try:
            async with asyncio.timeout(self.config.timeout_s) as deadline:
                return await self._follow(url, tally, deadline)
        except TimeoutError:
            return _Answer(Reason.TIMEOUT)
        except aiohttp.ClientConnectorDNSError as error:
            return _Answer(Reason.DNS_FAILURE, permanent=_is_unknown_name(error.os_error))
        except (aiohttp.ClientConnectorCertificateError, ssl.CertificateError):
            return _Answer(Reason.CONNECT_ERROR, permanent=True)
        except aiohttp.ClientConnectorError as error:
            forbidden = isinstance(error.os_error, ForbiddenAddress)
            return _Answer(Reason.FORBIDDEN_ADDRESS if forbidden else Reason.CONNECT_ERROR)
        except aiohttp.ClientResponseError:
            return _Answer(Reason.SERVER_ERROR)  # the answer is not HTTP
        except ValueError:  # aiohttp.InvalidURL among them: a host that no resolver takes
            return _Answer(Reason.INVALID_URL)
        except (aiohttp.ClientError, OSError):
            return _Answer(Reason.CONNECT_ERROR)

    async def _follow(self, url: str, tally: _Tally, deadline: asyncio.Timeout) -> _Answer:
        for _ in range(self.config.max_redirects + 1):
            request = self._session.get(URL(url, encoded=True), allow_redirects=False, trace_request_ctx=tally)
            async with request as response:
                location = response.headers.get("Location")
                if response.status in _REDIRECTS and location and not self._opted_out(response):
                    target = canonical_url(urljoin(url, location))
                    if target is None:  # another scheme, credentials, or no url at all
                        return _Answer(Reason.FORBIDDEN_ADDRESS, status=response.status)
                    url = target
                    continue
                return await self._read(response, tally, deadline)
        return _Answer(Reason.TOO_MANY_REDIRECTS, status=response.status)

    async def _read(self, response: aiohttp.ClientResponse, tally: _Tally, deadline: asyncio.Timeout) -> _Answer:
        headers = response.headers
        answer = _Answer(
            reason=self._refusal(response),
            status=response.status,
            etag=headers.get("ETag"),
            last_modified=headers.get("Last-Modified"),
            retry_after_s=parse_retry_after(headers.get("Retry-After"), time.time()),
        )
        if answer.reason is not None:
            return answer
        reserved = self._max_bytes if response.content_length is None else response.content_length
        await self._reserve(reserved, deadline)
        try:
            body = await self._read_body(response, tally)
        except BaseException:
            await self._budget.release(reserved)
            raise
        if isinstance(body, Reason):
            await self._budget.release(reserved)
            return replace(answer, reason=body)
        return replace(answer, body=body, reserved=reserved)

    def _refusal(self, response: aiohttp.ClientResponse) -> Reason | None:
        """What status and headers alone decide."""
        if response.status < 400 and self._opted_out(response):
            return Reason.OPTED_OUT
        if not 200 <= response.status < 300:
            return reason_of_status(response.status)
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            return Reason.BODY_ENCODED
        if (response.content_length or 0) > self._max_bytes:
            return Reason.BODY_TOO_LARGE
        return None

    def _opted_out(self, response: aiohttp.ClientResponse) -> bool:
        values = response.headers.getall("X-Robots-Tag", [])
        return is_opted_out(values, self.config.opt_out_directives, AGENT)

    async def _reserve(self, amount: int, deadline: asyncio.Timeout) -> None:
        """Take bytes of the budget; a wait for our own memory does not count against the server."""
        loop = asyncio.get_running_loop()
        ends_at = deadline.when()
        started = loop.time()
        deadline.reschedule(None)
        await self._budget.acquire(amount)
        deadline.reschedule(None if ends_at is None else ends_at + loop.time() - started)

    async def _read_body(self, response: aiohttp.ClientResponse, tally: _Tally) -> bytes | Reason:
        body = bytearray()
        try:
            async for chunk in response.content.iter_any():
                body += chunk
                tally.bytes += len(chunk)
                if len(body) > self._max_bytes:
                    response.close()
                    return Reason.BODY_TOO_LARGE
        except (aiohttp.ClientError, ConnectionError):
            return Reason.BODY_INCOMPLETE
        return bytes(body)


@dataclass
class _HostSlots:
    limit: int
    users: int = 0

    def __post_init__(self) -> None:
        self.semaphore = asyncio.Semaphore(self.limit)


def reason_of_status(status: int) -> Reason:
    """The verdict of an HTTP status outside 200-299."""
    if status in (404, 410):
        return Reason.NOT_FOUND
    if status == 429:
        return Reason.RATE_LIMITED
    if status == 408:
        return Reason.TIMEOUT
    return Reason.SERVER_ERROR if status >= 500 else Reason.CLIENT_ERROR


def parse_retry_after(value: str | None, now_s: float) -> float | None:
    """Seconds that a ``Retry-After`` header (a number or an HTTP date) asks for, None where it says nothing."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now_s)
    except (ValueError, OverflowError):
        return None


def _is_unknown_name(error: OSError) -> bool:
    return error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


async def _count_request(_: aiohttp.ClientSession, context: Any, __: Any) -> None:
    context.trace_request_ctx.requests += 1
