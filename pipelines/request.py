"""One request to a host that may be slow, hostile or gone: bounded in time, rate, bytes, header and addresses."""

import asyncio
import contextlib
import email.utils
import socket
import ssl
import time
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urljoin

import aiohttp
from yarl import URL

from coca.addresses import ForbiddenAddress
from coca.contract import Reason, canonical_url
from pipelines.budget import Budget
from pipelines.connections import AGENT
from pipelines.fetch_config import FetchConfig
from pipelines.opt_out import is_opted_out, is_tdm_reserved

_REDIRECTS = (301, 302, 303, 307, 308)
_LONGEST_VALIDATOR = 1024
_WORTH_DRAINING = 16 * 1024
_DRAIN_S = 0.5


@dataclass(frozen=True)
class Validators:
    """What an earlier answer said about its version, for a conditional request."""

    etag: str | None = None
    last_modified: str | None = None


@dataclass(frozen=True)
class BodyRule:
    """What a body may be."""

    max_bytes: int
    min_bytes: int = 0
    cut: bool = False
    """Of a longer body its beginning is enough."""
    opt_outs: bool = True
    """The headers may refuse the use of the body."""


@dataclass
class Clock:
    """What is left of an attempt's time over its redirects."""

    left_s: float


@dataclass
class Tally:
    requests: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Answer:
    """The end of one request. A body comes with bytes of the budget, which the receiver gives back."""

    reason: Reason | None = None
    body: bytes | None = None
    reserved: int = 0
    status: int | None = None
    location: str | None = None
    """Canonical url of a redirect's target."""
    not_modified: bool = False
    etag: str | None = None
    last_modified: str | None = None
    retry_after_s: float | None = None
    permanent: bool = False
    """Not worth another attempt, though its reason may pass later."""


class Requester:
    """Sends guarded requests; the budget bounds the bytes of all bodies that are held."""

    def __init__(self, config: FetchConfig, budget: Budget) -> None:
        self._config, self._budget = config, budget

    async def get(
        self,
        session: aiohttp.ClientSession,
        url: str,
        rule: BodyRule,
        clock: Clock,
        tally: Tally,
        validators: Validators | None = None,
    ) -> Answer:
        """One hop: a redirect is returned, not followed. Its time is taken off ``clock``."""
        started = asyncio.get_running_loop().time()
        meter = _Meter(started + clock.left_s)
        try:
            async with asyncio.timeout_at(meter.ends_at) as meter.timeout:
                return await self._ask(session, url, rule, meter, tally, validators)
        except TimeoutError:
            return meter.verdict()
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return _failure(error)
        finally:
            clock.left_s -= asyncio.get_running_loop().time() - started - meter.paused_s

    async def _ask(
        self,
        session: aiohttp.ClientSession,
        url: str,
        rule: BodyRule,
        meter: "_Meter",
        tally: Tally,
        validators: Validators | None,
    ) -> Answer:
        headers = _conditions(validators) if validators else None
        async with session.get(
            URL(url, encoded=True), allow_redirects=False, headers=headers, trace_request_ctx=tally
        ) as response:
            answer = self._judge_head(response, url, rule, validators is not None)
            meter.answer = answer
            if answer.reason is not None or answer.location is not None or answer.not_modified:
                await _drain(response)
                return answer
            return await self._read(response, answer, rule, meter, tally)

    def _judge_head(self, response: aiohttp.ClientResponse, url: str, rule: BodyRule, conditional: bool) -> Answer:
        """What status and headers alone decide."""
        headers, status = response.headers, response.status
        location = None
        reason = self._opt_out(response) if rule.opt_outs and status < 400 else None
        if sum(len(name) + len(value) for name, value in response.raw_headers) > self._config.max_header_bytes:
            reason = Reason.SERVER_ERROR
        elif reason is None and status in _REDIRECTS and "Location" in headers:
            location = _target(url, headers["Location"])
            if location is None:  # another scheme, credentials, or no url at all
                reason = Reason.FORBIDDEN_ADDRESS
        elif reason is None and not (status == 304 and conditional):
            reason = self._refusal(response, rule)
        return Answer(
            reason=reason,
            status=status,
            location=location,
            not_modified=reason is None and status == 304,
            etag=_validator(headers.get("ETag")),
            last_modified=_validator(headers.get("Last-Modified")),
            retry_after_s=parse_retry_after(headers.get("Retry-After"), time.time()),
        )

    def _opt_out(self, response: aiohttp.ClientResponse) -> Reason | None:
        robots = response.headers.getall("X-Robots-Tag", ())
        if robots and is_opted_out(robots, self._config.opt_out_directives, AGENT):
            return Reason.OPTED_OUT
        if self._config.tdm_reservation and is_tdm_reserved(response.headers.getall("tdm-reservation", ())):
            return Reason.TDM_RESERVED
        return None

    @staticmethod
    def _refusal(response: aiohttp.ClientResponse, rule: BodyRule) -> Reason | None:
        if not 200 <= response.status < 300:
            return reason_of_status(response.status)
        if response.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            return Reason.BODY_ENCODED
        length = response.content_length
        if length is not None and length > rule.max_bytes and not rule.cut:
            return Reason.BODY_TOO_LARGE
        if length is not None and length < rule.min_bytes:
            return Reason.BODY_TOO_SMALL
        return None

    async def _read(
        self, response: aiohttp.ClientResponse, answer: Answer, rule: BodyRule, meter: "_Meter", tally: Tally
    ) -> Answer:
        length = response.content_length
        reserved = rule.max_bytes if length is None else min(length, rule.max_bytes)
        await self._reserve(reserved, meter)
        try:
            body = await self._read_body(response, rule, meter, tally)
        except BaseException:
            self._budget.release(reserved)
            raise
        if isinstance(body, Reason):
            self._budget.release(reserved)
            return replace(answer, reason=body)
        return replace(answer, body=body, reserved=reserved)

    async def _reserve(self, amount: int, meter: "_Meter") -> None:
        """Take bytes of the budget; a wait for our own memory does not count against the server."""
        loop = asyncio.get_running_loop()
        started = loop.time()
        meter.timeout.reschedule(None)
        await self._budget.acquire(amount)
        meter.paused_s = loop.time() - started
        meter.ends_at += meter.paused_s
        meter.timeout.reschedule(meter.ends_at)

    async def _read_body(
        self, response: aiohttp.ClientResponse, rule: BodyRule, meter: "_Meter", tally: Tally
    ) -> bytes | Reason:
        config, stream = self._config, response.content
        chunks: list[bytes] = []
        size, started = 0, asyncio.get_running_loop().time()
        try:
            while not stream.at_eof():
                meter.expect(started + config.min_rate_grace_s, size, config.min_bytes_per_second)
                chunk = await stream.readany()
                chunks.append(chunk)
                size += len(chunk)
                tally.bytes += len(chunk)
                if size > rule.max_bytes:
                    response.close()
                    if rule.cut:
                        break
                    return Reason.BODY_TOO_LARGE
        except (aiohttp.ClientError, ConnectionError):
            return Reason.BODY_INCOMPLETE
        if size < rule.min_bytes:
            return Reason.BODY_TOO_SMALL
        return (chunks[0] if len(chunks) == 1 else b"".join(chunks))[: rule.max_bytes]


@dataclass
class _Meter:
    """The time of one request: its deadline, and within it the slowest that a body may come."""

    ends_at: float
    paused_s: float = 0.0
    answer: Answer | None = None
    slow_at: float = float("inf")

    def __post_init__(self) -> None:
        self.timeout: Any = None

    def expect(self, first_at: float, received: int, bytes_per_second: float) -> None:
        """Give up where no further byte comes before the average falls below the minimum rate."""
        if bytes_per_second > 0:
            self.slow_at = first_at + (received + 1) / bytes_per_second
            self.timeout.reschedule(min(self.ends_at, self.slow_at))

    def verdict(self) -> Answer:
        """A host that did answer and then dragged on is not asked again: it costs one deadline and no more."""
        if self.answer is None:
            return Answer(Reason.TIMEOUT)
        reason = Reason.TOO_SLOW if self.slow_at < self.ends_at else Reason.TIMEOUT
        return replace(self.answer, reason=reason, location=None, not_modified=False, permanent=True)


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


def _failure(error: Exception) -> Answer:
    """The verdict of an exchange that ended before a whole header."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return Answer(Reason.DNS_FAILURE, permanent=_is_unknown_name(error.os_error))
    if isinstance(error, (aiohttp.ClientConnectorCertificateError, ssl.CertificateError)):
        return Answer(Reason.CONNECT_ERROR, permanent=True)
    if isinstance(error, aiohttp.ClientConnectorError):
        forbidden = isinstance(error.os_error, ForbiddenAddress)
        return Answer(Reason.FORBIDDEN_ADDRESS if forbidden else Reason.CONNECT_ERROR)
    if isinstance(error, aiohttp.ClientResponseError):
        return Answer(Reason.SERVER_ERROR)  # the answer is not HTTP
    if isinstance(error, ValueError):  # aiohttp.InvalidURL among them: a host that no resolver takes
        return Answer(Reason.INVALID_URL)
    return Answer(Reason.CONNECT_ERROR)


def _target(url: str, location: str) -> str | None:
    try:
        return canonical_url(urljoin(url, location))
    except ValueError:  # bytes that are no text, brackets that are no address
        return None


def _conditions(validators: Validators) -> dict[str, str]:
    etag, last_modified = _validator(validators.etag), _validator(validators.last_modified)
    return {name: text for name, text in (("If-None-Match", etag), ("If-Modified-Since", last_modified)) if text}


def _validator(value: str | None) -> str | None:
    """A validator that can be stored and sent back; a server may send any bytes as one."""
    plain = value and value.isascii() and value.isprintable() and len(value) <= _LONGEST_VALIDATOR
    return value if plain else None


async def _drain(response: aiohttp.ClientResponse) -> None:
    """Read what is left of a small body that is not wanted: its connection can be used again."""
    stream = response.content
    if not stream.at_eof() and (response.content_length or _WORTH_DRAINING + 1) <= _WORTH_DRAINING:
        with contextlib.suppress(TimeoutError, aiohttp.ClientError):
            async with asyncio.timeout(_DRAIN_S):
                while not stream.at_eof():
                    await stream.readany()


def _is_unknown_name(error: OSError) -> bool:
    return error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
