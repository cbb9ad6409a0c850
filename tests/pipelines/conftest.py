"""A web of our own on loopback: a raw HTTP/1.1 server that can misbehave in every way the fetcher must survive."""

import asyncio
import gzip
import hashlib
import io
import itertools
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from coca.tokenizer import train_bpe
from pipelines.config import RefreshConfig


def picture(name: str, size: tuple[int, int] = (80, 64), kind: str = "JPEG", mode: str = "RGB") -> bytes:
    """An image of its own for each name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    coarse = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


Page = Callable[[asyncio.StreamWriter, int], Awaitable[None]]


class Web:
    """The server: ``pages`` by path, every request counted by path."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.requests: Counter[str] = Counter()
        self.headers: dict[str, dict[str, str]] = {}
        self.connections = 0
        self.in_flight = self.most_in_flight = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def serve(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.server = self.loop.run_until_complete(asyncio.start_server(self._connection, "127.0.0.1", 0))
        self.port = self.server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._cancel_all)
        self._thread.join(5)

    def _cancel_all(self) -> None:
        self.server.close()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.loop.call_later(0.05, self.loop.stop)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                path = head[0].split(" ")[1]
                number = self.requests[path]
                self.requests[path] += 1
                self.headers[path] = {k.lower(): v for k, _, v in (line.partition(": ") for line in head[1:])}
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    await self.pages.get(path, answer(404, b"no such page"))(writer, number)
                finally:
                    self.in_flight -= 1
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()


def answer(status: int, body: bytes = b"", *headers: str, length: int | None = None, delay_s: float = 0.0) -> Page:
    """A page with a Content-Length; one that is larger than the body ends the connection early."""

    async def page(writer: asyncio.StreamWriter, number: int) -> None:
        await asyncio.sleep(delay_s)
        size = len(body) if length is None else length
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {size}", *headers, "", ""]
        writer.write("\r\n".join(lines).encode("latin-1") + body)
        if size != len(body):
            await writer.drain()
            raise ConnectionError

    return page


def image(name: str, *headers: str, **options: object) -> Page:
    return answer(200, picture(name, **options), "Content-Type: image/jpeg", *headers)  # type: ignore[arg-type]


def in_turn(*pages: Page) -> Page:
    """The first page for the first request, and so on; the last one from then on."""

    async def page(writer: asyncio.StreamWriter, number: int) -> None:
        await pages[min(number, len(pages) - 1)](writer, number)

    return page


def redirect(to: str, status: int = 302) -> Page:
    return answer(status, b"", f"Location: {to}")


async def trickle(writer: asyncio.StreamWriter, number: int) -> None:
    """One byte at a time: no pause is long, the whole takes forever."""
    writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def hang(writer: asyncio.StreamWriter, number: int) -> None:
    await asyncio.sleep(3600)


async def endless(writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
        await writer.drain()


async def hang_up(writer: asyncio.StreamWriter, number: int) -> None:
    raise ConnectionError


async def not_http(writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
    await writer.drain()
    raise ConnectionError


def gzipped(body: bytes) -> Page:
    return answer(200, gzip.compress(body), "Content-Encoding: gzip")


@pytest.fixture
def web() -> Iterator[Web]:
    web = Web()
    web.serve()
    yield web
    web.stop()


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    captions = ["a small red circle above a blue square", "a large green triangle on white"]
    path.write_text(train_bpe(captions, vocab_size=300).to_json(), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def pages() -> SimpleNamespace:
    """The makers of pages; test modules cannot import this file."""
    makers = (answer, image, in_turn, redirect, trickle, hang, endless, hang_up, not_http, gzipped, picture)
    return SimpleNamespace(**{maker.__name__: maker for maker in makers})


@pytest.fixture
def refresh_config(web: Web, tmp_path: Path, tokenizer_file: Path) -> Callable[..., RefreshConfig]:
    """``refresh_config(pairs, **settings)``: a refresh of pairs (path or url, caption) into ``tmp_path/dataset``."""

    numbers = itertools.count()

    def build(pairs: list[tuple[str | None, str | None]], **settings: Any) -> RefreshConfig:
        urls = [f"{web.url}{url}" if url and url.startswith("/") else url for url, _ in pairs]
        links = pa.table({"url": pa.array(urls, pa.string()), "caption": pa.array([c for _, c in pairs], pa.string())})
        path = tmp_path / f"links-{next(numbers)}.parquet"
        pq.write_table(links, path)
        values: dict[str, Any] = {
            "to": str(tmp_path / "dataset"),
            "tokenizer": str(tokenizer_file),
            "links": {"uri": str(path)},
            "fetch": {
                "allow_networks": ["127.0.0.0/8"],
                "timeout_s": 1.0,
                "retries": 1,
                "backoff_s": 0.01,
                "decode_processes": 1,
                "breaker_failures": 100,  # the pages of this web all lie on one host
                "requests_per_second_per_domain": 10_000,
                "robots_txt": False,  # or every count of requests has one more for each host
            },
            "image": {"limits": {"min_side": 32, "max_bytes": 100_000}},
            "publish": {"rows_per_row_group": 4, "links_per_part": 8, "links_per_batch": 16, "lease_s": 2.0},
        }
        for key, value in settings.items():
            values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
        return RefreshConfig.model_validate(values)

    return build


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a job one after the other in this process, for tests of what stands around them."""
    from pipelines.parts import FetchJob, FetchPart, PartDone, read_report

    def run_parts(parts: list[tuple[int, int]], job: FetchJob) -> Iterator[PartDone]:
        worker = FetchPart(job)
        try:
            for batch, part in parts:
                yield read_report(worker({"batch": batch, "part": part}))
        finally:
            worker.close()

    monkeypatch.setattr("pipelines.run.run_parts", run_parts)
