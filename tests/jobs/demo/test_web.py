"""The demo's server, asked by a real client over a real socket."""

import asyncio
import hashlib
import os
import signal
import socket
import subprocess
import sys
import time

import aiohttp
import httpx
import pytest

from coca.errors import BadInput
from jobs.demo.links import _free_port
from jobs.demo.web import Page, serve_web, write_pages

BODY = bytes(range(256)) * 40
PAGES = [
    Page("/plain.jpg", "body", headers={"Content-Type": "image/jpeg"}),
    Page("/gone.jpg", "body", status=410),
    Page("/once.jpg", "body", fails_first=1),
    Page("/slow.jpg", "body", delay_s=0.4),
    Page("/never.jpg", "body", delay_s=3600),
    Page("/half.jpg", "body", content_length=2 * len(BODY)),
    Page("/no-ai.jpg", "body", headers={"X-Robots-Tag": "noai"}),
    Page("/moved.html", status=301, headers={"Location": "/plain.jpg"}),
]


def make_root(root):
    (root / "body").write_bytes(BODY)
    (root / "port").write_text(str(_free_port()))
    write_pages(root, PAGES)
    return root


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    with serve_web(make_root(tmp_path_factory.mktemp("site"))) as url:
        yield url


def test_a_plain_page_has_its_bytes_type_and_validator(base):
    answer = httpx.get(f"{base}/plain.jpg")
    assert (answer.status_code, answer.content, answer.headers["Content-Type"]) == (200, BODY, "image/jpeg")
    assert answer.headers["ETag"] == f'"{hashlib.sha256(BODY).hexdigest()[:16]}"'
    again = httpx.get(f"{base}/plain.jpg", headers={"If-None-Match": answer.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_dead_and_unknown_pages(base):
    assert httpx.get(f"{base}/gone.jpg").status_code == 410
    assert httpx.get(f"{base}/unheard-of.jpg").status_code == 404


def test_a_page_that_fails_once_passes_then_for_good(base):
    assert [httpx.get(f"{base}/once.jpg").status_code for _ in range(3)] == [500, 200, 200]


def test_a_slow_page_comes_late_and_a_hanging_one_never(base):
    start = time.monotonic()
    assert httpx.get(f"{base}/slow.jpg").content == BODY
    assert time.monotonic() - start >= 0.4
    with pytest.raises(httpx.ReadTimeout):
        httpx.get(f"{base}/never.jpg", timeout=0.3)


def test_a_truncated_transfer_breaks_off(base):
    with pytest.raises(httpx.RemoteProtocolError, match="received 10240 bytes, expected 20480"):
        httpx.get(f"{base}/half.jpg")


def test_headers_and_redirects(base):
    assert httpx.get(f"{base}/no-ai.jpg").headers["X-Robots-Tag"] == "noai"
    assert httpx.get(f"{base}/moved.html").headers["Location"] == "/plain.jpg"
    assert httpx.get(f"{base}/moved.html", follow_redirects=True).content == BODY


def test_requests_are_counted_by_path(tmp_path):
    with serve_web(make_root(tmp_path)) as base:
        for _ in range(3):
            httpx.get(f"{base}/gone.jpg")
        httpx.get(f"{base}/plain.jpg")
        assert httpx.get(f"{base}/-/requests").json() == {"/gone.jpg": 3, "/plain.jpg": 1}


def test_it_bears_hundreds_of_requests_a_second(base):
    async def ask(count):
        connector = aiohttp.TCPConnector(limit=32)
        async with aiohttp.ClientSession(connector=connector) as session:

            async def one():
                async with session.get(f"{base}/plain.jpg") as answer:
                    return len(await answer.read())

            return await asyncio.gather(*(one() for _ in range(count)))

    start = time.monotonic()
    assert asyncio.run(ask(600)) == [len(BODY)] * 600
    assert 600 / (time.monotonic() - start) > 100


def test_a_taken_port_is_refused_with_the_way_out(tmp_path, monkeypatch):
    root = make_root(tmp_path)
    with socket.socket() as other:
        other.bind(("127.0.0.1", int((root / "port").read_text())))
        other.listen()
        with pytest.raises(BadInput, match=r"port \d+.* is taken by another program.*--out"), serve_web(root):
            pass


def test_the_port_is_free_again_after_the_block(tmp_path):
    root = make_root(tmp_path)
    for _ in range(2):
        with serve_web(root) as base:
            assert httpx.get(f"{base}/plain.jpg").status_code == 200
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{base}/plain.jpg")


PARENT = """
import sys, time
from pathlib import Path
from jobs.demo.web import serve_web
with serve_web(Path(sys.argv[1])) as base:
    print(base, flush=True)
    time.sleep(600)
"""


def test_no_server_outlives_a_killed_parent(tmp_path):
    root = make_root(tmp_path)
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(root)], stdout=subprocess.PIPE, text=True)
    base = parent.stdout.readline().strip()
    assert httpx.get(f"{base}/plain.jpg").status_code == 200
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    with serve_web(root) as again:  # the same port, at once
        assert again == base
        assert httpx.get(f"{base}/-/requests").json() == {}
