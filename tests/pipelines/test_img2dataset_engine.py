"""img2dataset's downloader as the engine: its error texts in our reasons; itself where it is installed."""

import asyncio
import importlib.util
import io
from typing import Any

import pytest

from coca.contract import Reason
from coca.errors import BadInput
from pipelines import img2dataset_engine
from pipelines.fetch import Fetched, create_fetcher
from pipelines.fetch_config import FetchConfig
from pipelines.img2dataset_engine import Img2datasetFetcher, import_download, reason_of_error

installed = importlib.util.find_spec("img2dataset") is not None


async def keep(body: bytes) -> bytes:
    return body


def fetch(*urls: str, max_bytes: int = 1000, min_bytes: int = 0, **settings: Any) -> list[Fetched[bytes]]:
    config = FetchConfig(engine="img2dataset", **{"timeout_s": 1, "retries": 1} | settings)

    async def run() -> list[Fetched[bytes]]:
        async with create_fetcher(config, max_bytes, keep, None, min_bytes) as fetcher:
            assert isinstance(fetcher, Img2datasetFetcher)
            return list(await asyncio.gather(*map(fetcher.fetch, urls)))

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("text", "reason", "status"),
    [
        ("HTTP Error 404: Not Found", Reason.NOT_FOUND, 404),
        ("HTTP Error 403: Forbidden", Reason.CLIENT_ERROR, 403),
        ("HTTP Error 429: Too Many Requests", Reason.RATE_LIMITED, 429),
        ("HTTP Error 503: Service Unavailable", Reason.SERVER_ERROR, 503),
        (
            "HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.\nThe last",
            Reason.TOO_MANY_REDIRECTS,
            302,
        ),
        ("HTTP Error 302: Found - Redirection to url 'file:///a' is not allowed", Reason.FORBIDDEN_ADDRESS, 302),
        ("Use of image disallowed by X-Robots-Tag directive", Reason.OPTED_OUT, None),
        ("<urlopen error [Errno -2] Name or service not known>", Reason.DNS_FAILURE, None),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", Reason.DNS_FAILURE, None),
        ("<urlopen error [Errno -5] No address associated with hostname>", Reason.DNS_FAILURE, None),
        ("<urlopen error timed out>", Reason.TIMEOUT, None),
        ("The read operation timed out", Reason.TIMEOUT, None),
        ("<urlopen error _ssl.c:1011: The handshake operation timed out>", Reason.TIMEOUT, None),
        ("<urlopen error [Errno 110] Connection timed out>", Reason.TIMEOUT, None),
        ("<urlopen error [Errno 111] Connection refused>", Reason.CONNECT_ERROR, None),
        ("<urlopen error [Errno 101] Network is unreachable>", Reason.CONNECT_ERROR, None),
        ("[Errno 104] Connection reset by peer", Reason.CONNECT_ERROR, None),
        ("Remote end closed connection without response", Reason.CONNECT_ERROR, None),
        (
            "<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate>",
            Reason.CONNECT_ERROR,
            None,
        ),
        ("IncompleteRead(3 bytes read, 97 more expected)", Reason.BODY_INCOMPLETE, None),
        ("unknown url type: 'example'", Reason.INVALID_URL, None),
        ("<urlopen error unknown url type: gopher>", Reason.INVALID_URL, None),
        ("<urlopen error no host given>", Reason.INVALID_URL, None),
        ("nonnumeric port: 'a'", Reason.INVALID_URL, None),
        ("URL can't contain control characters. '/a b' (found at least ' ')", Reason.INVALID_URL, None),
        (
            "'ascii' codec can't encode character '\\xe9' in position 5: ordinal not in range(128)",
            Reason.INVALID_URL,
            None,
        ),
        ("encoding with 'idna' codec failed (UnicodeError: label empty or too long)", Reason.INVALID_URL, None),
        ("SSH-2.0-OpenSSH_9.2", Reason.SERVER_ERROR, None),
        ("got more than 65536 bytes when reading header line", Reason.SERVER_ERROR, None),
        ("", Reason.SERVER_ERROR, None),
    ],
)
def test_every_error_text_has_its_reason(text: str, reason: Reason, status: int | None) -> None:
    assert reason_of_error(text) == (reason, status)


def test_what_the_downloader_says_becomes_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    bodies = {"small": b"x", "fine": b"x" * 10, "large": b"x" * 1001}

    def download(row: tuple[int, str], *arguments: Any) -> tuple[int, io.BytesIO | None, str | None]:
        asked.append((row[1], *arguments))
        body = bodies.get(row[1])
        return (row[0], io.BytesIO(body), None) if body else (row[0], None, "HTTP Error 410: Gone")

    monkeypatch.setattr(img2dataset_engine, "import_download", lambda: download)
    assert fetch("small", "fine", "large", "gone", min_bytes=2, opt_out_directives=["noai"]) == [
        Fetched(Reason.BODY_TOO_SMALL, status=200, requests=1, bytes=1),
        Fetched(result=b"x" * 10, status=200, requests=1, bytes=10),
        Fetched(Reason.BODY_TOO_LARGE, status=200, requests=1, bytes=1001),
        Fetched(Reason.NOT_FOUND, status=410, requests=2),
    ]
    assert ("fine", 1.0, 1, "coca", ["noai"]) in asked


@pytest.mark.skipif(installed, reason="img2dataset is installed")
def test_without_the_package_the_way_out_is_named() -> None:
    with pytest.raises(BadInput, match="cannot be imported") as error:
        import_download()
    assert "pip install 'coca[img2dataset]'" in error.value.way_out


def test_the_real_downloader(web: Any, pages: Any) -> None:
    pytest.importorskip("img2dataset.downloader")
    web.pages["/a"] = pages.in_turn(pages.answer(500), pages.answer(200, b"bytes"))
    web.pages["/noai"] = pages.answer(200, b"bytes", "X-Robots-Tag: coca: noai")
    web.pages["/cut"] = pages.answer(200, b"by", length=100)
    web.pages["/loop"] = pages.redirect("/loop")
    web.pages["/hang"] = pages.hang
    paths = ("/a", "/noai", "/gone", "/cut", "/loop", "/hang")
    got = dict(zip(paths, fetch(*(web.url + path for path in paths)), strict=True))
    assert got["/a"].result == b"bytes"
    assert "(compatible; coca; +https://github.com/rom1504/img2dataset)" in web.headers["/a"]["user-agent"]
    assert {path: each.reason for path, each in got.items() if each.reason} == {
        "/noai": Reason.OPTED_OUT,
        "/gone": Reason.NOT_FOUND,
        "/cut": Reason.BODY_INCOMPLETE,
        "/loop": Reason.TOO_MANY_REDIRECTS,
        "/hang": Reason.TIMEOUT,
    }
    assert web.requests["/noai"] == web.requests["/gone"] == got["/gone"].requests == 2
