"""The web server of the demo: serves a folder on loopback, each path with the manners its manifest gives it.

``python -m jobs.demo.web --root DIR`` prints its port once it listens, and ends when its input closes.
"""

import asyncio
import collections
import contextlib
import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import click
from aiohttp import web

from coca.errors import BadInput

PAGES = "pages.jsonl"
PORT = "port"
_HOST = "127.0.0.1"
_BIND_PATIENCE_S = 5.0


@dataclass(frozen=True)
class Page:
    """One path of the web and how it behaves."""

    path: str
    file: str = ""  # relative to the root; nothing for an empty body
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0  # before the first byte
    fails_first: int = 0  # so many first requests get a 500
    content_length: int | None = None  # a longer body than is sent: the connection then closes


def write_pages(root: Path, pages: list[Page]) -> None:
    (root / PAGES).write_text("".join(json.dumps(asdict(page)) + "\n" for page in pages))


def read_pages(root: Path) -> dict[str, Page]:
    """The pages by path."""
    lines = (root / PAGES).read_text().splitlines()
    return {page.path: page for page in (Page(**json.loads(line)) for line in lines)}


class Site:
    """The handler of all requests; counts them by path."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._pages = read_pages(root)
        self._requests: collections.Counter[str] = collections.Counter()

    async def show_requests(self, request: web.Request) -> web.Response:
        """How often each path was asked for since the start."""
        return web.json_response(dict(self._requests))

    async def answer(self, request: web.Request) -> web.StreamResponse:
        page = self._pages.get(request.path)
        if page is None:
            return web.Response(status=404, text="no such page")
        self._requests[page.path] += 1
        if page.delay_s:
            await asyncio.sleep(page.delay_s)
        if self._requests[page.path] <= page.fails_first:
            return web.Response(status=500, text="try again")
        body = (self._root / page.file).read_bytes() if page.file else b""
        if page.content_length is not None:
            return await _broken_off(request, page, body)
        etag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
        if page.status == 200 and request.headers.get("If-None-Match") == etag:
            return web.Response(status=304, headers={"ETag": etag})
        return web.Response(status=page.status, body=body, headers={"ETag": etag, **page.headers})


async def _broken_off(request: web.Request, page: Page, body: bytes) -> web.StreamResponse:
    response = web.StreamResponse(status=page.status, headers=page.headers)
    response.content_length = page.content_length
    await response.prepare(request)
    await response.write(body)
    if request.transport is not None:
        request.transport.close()
    return response


async def _listen(root: Path, port: int) -> web.AppRunner:
    site = Site(root)
    app = web.Application()
    app.router.add_get("/-/requests", site.show_requests)
    app.router.add_get("/{path:.*}", site.answer)
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    deadline = asyncio.get_running_loop().time() + _BIND_PATIENCE_S
    while True:
        try:
            await web.TCPSite(runner, _HOST, port).start()
            return runner
        except OSError as error:
            # A server whose demo was killed a moment ago needs that moment to leave the port.
            if error.errno != errno.EADDRINUSE or asyncio.get_running_loop().time() > deadline:
                await runner.cleanup()
                raise
            await asyncio.sleep(0.1)


async def _run(root: Path, port: int) -> None:
    runner = await _listen(root, port)
    print(runner.addresses[0][1], flush=True)
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    await stopped.wait()
    await runner.cleanup()


def _stop_with_parent() -> None:
    # The pipe closes when the parent ends, however it ends: no server outlives its demo.
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def serve_web(root: Path) -> Iterator[str]:
    """Serve ``root`` on its own port from a process of its own while the block runs; yields ``http://host:port``.

    Raises:
        BadInput: another program holds the port.
    """
    port = int((root / PORT).read_text())
    command = [sys.executable, "-m", "jobs.demo.web", "--root", str(root), "--port", str(port)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        if process.stdout.readline().strip() != str(port):
            raise BadInput(
                f"port {port}, which the links in {root} point to, is taken by another program",
                "Stop that program, or start a demo in a new folder with --out",
            )
        yield f"http://{_HOST}:{port}"
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(timeout=30)


@click.command()
@click.option("--root", type=click.Path(path_type=Path, exists=True), required=True, help="Folder to serve.")
@click.option("--port", type=int, default=0, help="Port on loopback; 0 takes a free one.")
def main(root: Path, port: int) -> None:
    """Serve a generated web until standard input closes."""
    try:
        asyncio.run(_run(root, port))
    except OSError as error:
        raise click.ClickException(f"cannot listen on port {port}: {error.strerror}") from None


if __name__ == "__main__":
    main()
