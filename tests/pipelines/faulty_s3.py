"""A proxy before an S3 server that answers 503, late, short or not at all; a process of its own.

Started by :func:`faulty_s3` as ``python -m tests.pipelines.faulty_s3 BACKEND SEED``. What befalls a request follows
from the seed, its line and how often that line has come before, not from the order in which several clients come, nor
from which bucket a test was given.
"""

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CONTROL = "/__faults__"


@dataclass(frozen=True)
class Faults:
    """The share of requests that each fault befalls; at most one befalls a request."""

    slow_down: float = 0.0
    """503 SlowDown; the server never hears of the request."""
    late_error: float = 0.0
    """The server does what is asked; the client is told 500 InternalError."""
    lost: float = 0.0
    """The server does what is asked; the connection ends without an answer."""
    cut: float = 0.0
    """The answer ends in its middle, mostly in its body."""
    slow: float = 0.0
    """The answer comes ``slow_s`` late, its body in pieces."""
    slow_s: float = 0.5
    in_a_row: int = 2
    """Faults that befall the same line one after the other; then an answer comes through."""

    @classmethod
    def all(cls, rate: float) -> "Faults":
        """Every kind, together at a rate."""
        return cls(slow_down=rate / 5, late_error=rate / 5, lost=rate / 5, cut=rate / 5, slow=rate / 5)

    def choose(self, random_: random.Random) -> str:
        """The name of a fault, "" for none."""
        left = random_.random()
        for name in ("slow_down", "late_error", "lost", "cut", "slow"):
            left -= getattr(self, name)
            if left < 0:
                return name
        return ""


class FaultyS3:
    """A running proxy, seen from a test."""

    def __init__(self, process: "subprocess.Popen[str]", endpoint: str) -> None:
        self.process, self.endpoint = process, endpoint

    def set(self, faults: Faults, only: str = "") -> None:
        """From now on; ``only``: a regular expression that a request's "METHOD /bucket/key?query" must hold."""
        self._control(json.dumps({"faults": asdict(faults), "only": only}).encode())

    def counts(self) -> Counter[str]:
        """Requests by fault; the key of those without is empty."""
        return Counter(self._control(None))

    def _control(self, body: bytes | None) -> Any:
        with urllib.request.urlopen(self.endpoint + CONTROL, data=body, timeout=30) as answer:
            return json.load(answer)


@contextlib.contextmanager
def faulty_s3(backend: str, seed: int, faults: Faults | None = None) -> Iterator[FaultyS3]:
    """A proxy before the S3 server at the endpoint ``backend``; without ``faults`` it only passes on."""
    command = [sys.executable, "-m", "tests.pipelines.faulty_s3", backend, str(seed)]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            assert process.stdout is not None
            proxy = FaultyS3(process, process.stdout.readline().strip())
            proxy.set(faults or Faults())
            yield proxy
        finally:
            process.kill()


@dataclass
class _Request:
    line: str
    """Method and target."""
    head: bytes
    """As the server is to get it."""
    body: bytes


class _Proxy:
    def __init__(self, backend: str, seed: int) -> None:
        parts = urlsplit(backend)
        self._host, self._port, self._seed = parts.hostname, parts.port, seed
        self._faults, self._only = Faults(), ""
        self._seen: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()

    async def serve(self) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**20, backlog=512)
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A test may end with requests under way, and a client may leave at any moment.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            request = await _read_request(reader, writer)
            if request.line.endswith(CONTROL):
                writer.write(_answer(200, self._control(request.body)))
            else:
                await self._handle(request, writer)
            await writer.drain()
        writer.close()

    def _control(self, body: bytes) -> bytes:
        if body:
            values = json.loads(body)
            self._faults, self._only = Faults(**values["faults"]), values["only"]
        return json.dumps(self._counts).encode()

    async def _handle(self, request: _Request, writer: asyncio.StreamWriter) -> None:
        self._seen[request.line] += 1
        asked = re.sub(r"(?<=/)bucket-[0-9]+", "", request.line)
        random_ = random.Random(f"{self._seed} {asked} {self._seen[request.line]}")
        fault = self._faults.choose(random_) if re.search(self._only, request.line) else ""
        if self._in_a_row[request.line] >= self._faults.in_a_row:
            fault = ""
        self._in_a_row[request.line] = self._in_a_row[request.line] + 1 if fault else 0
        self._counts[fault] += 1
        if fault == "slow_down":
            writer.write(_error(503, "SlowDown", request.line))
            return
        answer = await self._ask(request)
        if fault == "lost":
            return
        if fault == "late_error":
            writer.write(_error(500, "InternalError", request.line))
        elif fault == "cut":
            writer.write(answer[: _middle(answer, random_)])
        elif fault == "slow":
            await asyncio.sleep(self._faults.slow_s)
            for start in range(0, len(answer), max(1, len(answer) // 4)):
                writer.write(answer[start : start + max(1, len(answer) // 4)])
                await writer.drain()
                await asyncio.sleep(self._faults.slow_s / 4)
        else:
            writer.write(answer)

    async def _ask(self, request: _Request) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(request.head + request.body)
            await writer.drain()
            head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
        return b"\r\n".join([*_without(head, b"connection"), b"Connection: close", b"", b""]) + body


async def _read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Request:
    head = (await reader.readuntil(b"\r\n\r\n")).removesuffix(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines[1:])}
    if headers.get(b"expect", b"").lower() == b"100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        body = await _read_chunks(reader)
    else:
        body = await reader.readexactly(int(headers.get(b"content-length", b"0")))
    method, target, _ = lines[0].decode("latin-1").split(" ")
    kept = _without(head, b"connection", b"expect")
    return _Request(f"{method} {target}", b"\r\n".join([*kept, b"Connection: close", b"", b""]), body)


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    """A chunked body as it lies on the wire."""
    body = b""
    while True:
        size = await reader.readuntil(b"\r\n")
        length = int(size.split(b";")[0], 16)
        body += size + await reader.readexactly(length + 2)
        if length == 0:
            return body


def _without(head: bytes, *names: bytes) -> list[bytes]:
    return [line for line in head.split(b"\r\n") if line.partition(b":")[0].strip().lower() not in names]


def _middle(answer: bytes, random_: random.Random) -> int:
    """Where to cut: within the body, where there is one."""
    start = answer.index(b"\r\n\r\n") + 4
    return random_.randrange(start, len(answer)) if start < len(answer) else random_.randrange(1, start)


def _error(status: int, code: str, line: str) -> bytes:
    text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
    return _answer(status, b"" if line.startswith("HEAD ") else text.encode())


def _answer(status: int, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"Connection: close\r\n\r\n" + body


if __name__ == "__main__":
    asyncio.run(_Proxy(sys.argv[1], int(sys.argv[2])).serve())
