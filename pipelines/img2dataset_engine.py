"""``fetch.engine: img2dataset``: that package's own downloader, for those who want its exact behaviour.

Nothing of ours stands between it and the web. It connects wherever a link or a redirect leads, private networks and
metadata services included, reads a body of any size to its end, asks for no robots.txt, knows no limits per domain, and
names itself as a browser with the token ``coca``. Run it only where the machine can reach nothing but the open web.
Its X-Robots-Tag check uses the directives of ``fetch.opt_out_directives``. Sizes are checked when a body has come.
"""

import asyncio
import importlib
import io
import re
import socket
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Self, TypeVar

from coca.contract import Reason
from coca.errors import BadInput
from pipelines.connections import AGENT
from pipelines.fetch import Fetched, Validators
from pipelines.fetch_config import FetchConfig
from pipelines.rate_leases import LeaseClient
from pipelines.request import reason_of_status

T = TypeVar("T")

Download = Callable[..., tuple[Any, io.BytesIO | None, str | None]]

_STATUS = re.compile(r"HTTP Error (\d{3})")
# What urllib, http.client and ssl write, in the order in which it is looked for.
_PHRASES: tuple[tuple[str, Reason], ...] = (
    (r"disallowed by X-Robots-Tag", Reason.OPTED_OUT),
    (r"infinite loop", Reason.TOO_MANY_REDIRECTS),
    (r"Redirection to url .* is not allowed", Reason.FORBIDDEN_ADDRESS),
    (r"timed out", Reason.TIMEOUT),
    (r"IncompleteRead", Reason.BODY_INCOMPLETE),
    (
        rf"\[Errno (?:{socket.EAI_NONAME}|{socket.EAI_AGAIN}|{socket.EAI_FAIL}|-5)\]|getaddrinfo failed",
        Reason.DNS_FAILURE,
    ),
    (
        r"unknown url type|no host given|nonnumeric port|control characters|codec can't encode"
        r"|label (?:empty|too long)|Invalid IPv6|not appear to be an IP",
        Reason.INVALID_URL,
    ),
    (r"\[Errno \d+\]|\[SSL|certificate|closed connection without response|EOF occurred", Reason.CONNECT_ERROR),
)


class Img2datasetFetcher(Generic[T]):
    """The interface of ``Fetcher`` over ``img2dataset.downloader.download_image_with_retry`` in threads.

    Its retries follow each other at once and come after any failure. It sends no conditional requests and takes no
    leases: ``validators``, ``leases`` and ``leased`` are accepted and have no effect.

    Raises:
        BadInput: img2dataset is not installed.
    """

    def __init__(
        self,
        config: FetchConfig,
        max_bytes: int,
        handle: Callable[[bytes], Awaitable[T]],
        leases: LeaseClient | None = None,
        min_bytes: int = 0,
    ) -> None:
        self.config, self._handle = config, handle
        self._max_bytes, self._min_bytes = max_bytes, min_bytes
        self._download = import_download()
        self._slots = asyncio.Semaphore(config.concurrency_per_worker)

    async def __aenter__(self) -> Self:
        self._threads = ThreadPoolExecutor(self.config.concurrency_per_worker, thread_name_prefix="img2dataset")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._threads.shutdown()

    async def fetch(self, url: str, *, validators: Validators | None = None, leased: bool = False) -> Fetched[T]:
        """Fetch a url. ``requests`` is exact for failures; a success counts as one, as the package does not tell."""
        async with self._slots:  # until the body is handled: no more bodies are held than threads
            config = self.config
            _, stream, error = await asyncio.get_running_loop().run_in_executor(
                self._threads,
                self._download,
                (0, url),
                config.timeout_s,
                config.retries,
                AGENT,
                list(config.opt_out_directives),
            )
            if stream is None:
                reason, status = reason_of_error(error or "")
                return Fetched(reason, status=status, requests=config.retries + 1)
            body = stream.getvalue()
            refusal = self._refusal(body)
            result = await self._handle(body) if refusal is None else None
            return Fetched(refusal, result, status=200, requests=1, bytes=len(body))

    def _refusal(self, body: bytes) -> Reason | None:
        if len(body) > self._max_bytes:
            return Reason.BODY_TOO_LARGE
        return Reason.BODY_TOO_SMALL if len(body) < self._min_bytes else None


def import_download() -> Download:
    """``download_image_with_retry``.

    Raises:
        BadInput: img2dataset is not installed, or what it needs is not.
    """
    try:
        download: Download = importlib.import_module("img2dataset.downloader").download_image_with_retry
    except ImportError as error:
        raise BadInput(
            f"fetch.engine = 'img2dataset', but it cannot be imported: {error}",
            "Install it with `pip install 'coca[img2dataset]'`, or set fetch.engine=coca",
        ) from None
    return download


def reason_of_error(text: str) -> tuple[Reason, int | None]:
    """The reason, and the HTTP status where there was one, for an error text of img2dataset (``str`` of an exception).

    A text that is not known stands for an answer that is not HTTP, such as the first line of another protocol.
    """
    match = _STATUS.match(text)
    status = int(match[1]) if match else None
    for phrase, reason in _PHRASES:
        if re.search(phrase, text):
            return reason, status
    return (reason_of_status(status), status) if status is not None else (Reason.SERVER_ERROR, None)
