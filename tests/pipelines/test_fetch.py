"""One url from hosts that misbehave: the exact verdict, the requests it cost, and what it may not reach."""

import asyncio
import socket
import time
from typing import Any

import pytest

from coca.contract import Reason
from pipelines.connections import user_agent
from pipelines.fetch import Fetched, Fetcher
from pipelines.fetch_config import FetchConfig
from pipelines.request import Answer, Validators

MAX_BYTES = 100_000
LOOPBACK = ("127.0.0.0/8",)


async def keep(body: bytes) -> bytes:
    return body


def fetch(
    *urls: str, max_bytes: int = MAX_BYTES, min_bytes: int = 0, validators: Validators | None = None, **settings: Any
) -> list[Fetched[bytes]]:
    values = {
        "allow_networks": LOOPBACK,
        "timeout_s": 0.5,
        "backoff_s": 0.01,
        "retries": 1,
        "robots_txt": False,
        "requests_per_second_per_domain": 1e6,
    } | settings

    async def run() -> list[Fetched[bytes]]:
        async with Fetcher(FetchConfig(**values), max_bytes, keep, min_bytes=min_bytes) as fetcher:
            return list(await asyncio.gather(*(fetcher.fetch(url, validators=validators) for url in urls)))

    return asyncio.run(run())


def test_a_body_comes_whole_with_its_validators(web: Any, pages: Any) -> None:
    web.pages["/a"] = pages.answer(200, b"bytes", 'ETag: "v1"', "Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT")
    (got,) = fetch(f"{web.url}/a")
    assert got == Fetched(
        result=b"bytes", status=200, requests=1, bytes=5, etag='"v1"', last_modified="Mon, 01 Jan 2024 00:00:00 GMT"
    )


def test_who_asks_is_said_and_nothing_more_is_sent(web: Any, pages: Any) -> None:
    web.pages["/a"] = pages.answer(200, b"x", "Set-Cookie: id=1; Path=/")
    web.pages["/b"] = pages.answer(200, b"x")
    fetch(f"{web.url}/a", contact="https://example.org/bot")
    fetch(f"{web.url}/b")
    sent = web.headers["/a"]
    assert sent["user-agent"] == user_agent("https://example.org/bot")
    assert sent["user-agent"].startswith("coca/")
    assert sent["user-agent"].endswith(" (+https://example.org/bot)")
    assert sent["accept-encoding"] == "identity"
    assert not {"cookie", "authorization", "referer"} & (sent.keys() | web.headers["/b"].keys())


@pytest.mark.parametrize(
    ("page", "reason", "status", "requests"),
    [
        (lambda p: p.answer(404), Reason.NOT_FOUND, 404, 1),
        (lambda p: p.answer(410), Reason.NOT_FOUND, 410, 1),
        (lambda p: p.answer(403), Reason.CLIENT_ERROR, 403, 1),
        (lambda p: p.answer(304), Reason.CLIENT_ERROR, 304, 1),
        (lambda p: p.answer(302), Reason.CLIENT_ERROR, 302, 1),  # a redirect to nowhere
        (lambda p: p.answer(429), Reason.RATE_LIMITED, 429, 2),
        (lambda p: p.answer(500), Reason.SERVER_ERROR, 500, 2),
        (lambda p: p.answer(503), Reason.SERVER_ERROR, 503, 2),
        (lambda p: p.trickle, Reason.TIMEOUT, 200, 1),
        (lambda p: p.answer(200, b"x", "tdm-reservation: 1"), Reason.TDM_RESERVED, 200, 1),
        (lambda p: p.hang, Reason.TIMEOUT, None, 2),
        (lambda p: p.not_http, Reason.SERVER_ERROR, None, 2),
        (lambda p: p.endless, Reason.BODY_TOO_LARGE, 200, 1),
        (lambda p: p.answer(200, b"", length=10**12), Reason.BODY_TOO_LARGE, 200, 1),
        (lambda p: p.answer(200, b"x" * (MAX_BYTES + 1)), Reason.BODY_TOO_LARGE, 200, 1),
        (lambda p: p.answer(200, b"cut", length=4000), Reason.BODY_INCOMPLETE, 200, 2),
        (lambda p: p.gzipped(b"x" * 1000), Reason.BODY_ENCODED, 200, 1),
        (lambda p: p.answer(200, b"x", "X-Robots-Tag: noai"), Reason.OPTED_OUT, 200, 1),
        (lambda p: p.answer(200, b"x", "X-Robots-Tag: coca: none"), Reason.OPTED_OUT, 200, 1),
        (lambda p: p.redirect("http://10.0.0.1/"), Reason.FORBIDDEN_ADDRESS, None, 1),
        (lambda p: p.redirect("http://[::ffff:169.254.169.254]/"), Reason.FORBIDDEN_ADDRESS, None, 1),
        (lambda p: p.redirect("file:///etc/passwd"), Reason.FORBIDDEN_ADDRESS, 302, 1),
        (lambda p: p.redirect("http://user:secret@8.8.8.8/"), Reason.FORBIDDEN_ADDRESS, 302, 1),
        (lambda p: p.redirect("/page", status=308), Reason.TOO_MANY_REDIRECTS, 308, 6),
    ],
)
def test_the_verdict_on_a_page(
    web: Any, pages: Any, page: Any, reason: Reason, status: int | None, requests: int
) -> None:
    web.pages["/page"] = page(pages)
    (got,) = fetch(f"{web.url}/page")
    assert (got.reason, got.result, got.status) == (reason, None, status)
    assert got.requests == sum(web.requests.values()) == requests


def test_a_server_that_hangs_up_is_a_connect_error(web: Any, pages: Any) -> None:
    web.pages["/page"] = pages.hang_up
    (got,) = fetch(f"{web.url}/page")
    assert (got.reason, got.requests) == (Reason.CONNECT_ERROR, 2)
    assert web.requests["/page"] == 2  # none behind our back


def test_a_closed_port_is_a_connect_error_without_a_request() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, never listening
        (got,) = fetch(f"http://127.0.0.1:{held.getsockname()[1]}/a")
    assert (got.reason, got.requests) == (Reason.CONNECT_ERROR, 0)


def test_a_name_that_does_not_resolve_is_a_dns_failure() -> None:
    (got,) = fetch("http://nobody.invalid/a", retries=0, timeout_s=20)
    assert (got.reason, got.requests) == (Reason.DNS_FAILURE, 0)


@pytest.mark.parametrize("url", [f"http://{'a' * 70}.example/", "http://127.1/", "http://2130706433/"])
def test_a_host_that_is_none_is_an_invalid_url(url: str) -> None:
    (got,) = fetch(url, allow_networks=())
    assert (got.reason, got.requests) == (Reason.INVALID_URL, 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::ffff:127.0.0.1]", "[::1]", "0.0.0.0"])
def test_forbidden_addresses_are_never_connected_to(web: Any, pages: Any, host: str) -> None:
    web.pages["/a"] = pages.answer(200, b"secret")
    (got,) = fetch(f"http://{host}:{web.port}/a", allow_networks=())
    assert (got.reason, got.requests) == (Reason.FORBIDDEN_ADDRESS, 0)
    assert web.connections == 0


def test_a_forbidden_port_of_an_open_address_is_never_connected_to() -> None:
    (got,) = fetch("http://8.8.8.8:6379/")
    assert (got.reason, got.requests) == (Reason.FORBIDDEN_ADDRESS, 0)


def test_redirects_are_followed_up_to_the_limit(web: Any, pages: Any) -> None:
    for step in range(6):
        web.pages[f"/{step}"] = pages.redirect(f"{step + 1}", status=(301, 302, 303, 307, 308)[step % 5])
    web.pages["/6"] = pages.answer(200, b"end")
    near, far = fetch(f"{web.url}/1", f"{web.url}/0")
    assert (near.result, near.requests) == (b"end", 6)
    assert (far.reason, far.requests) == (Reason.TOO_MANY_REDIRECTS, 6)


def test_what_passes_after_a_retry_is_kept(web: Any, pages: Any) -> None:
    fine = pages.answer(200, b"fine")
    web.pages["/500"] = pages.in_turn(pages.answer(500), pages.answer(502), fine)
    web.pages["/cut"] = pages.in_turn(pages.answer(200, b"f", length=4), fine)
    web.pages["/slow"] = pages.in_turn(pages.hang, fine)
    results = fetch(f"{web.url}/500", f"{web.url}/cut", f"{web.url}/slow", retries=2)
    assert [got.result for got in results] == [b"fine"] * 3
    assert [got.requests for got in results] == [3, 2, 2]


def test_retry_after_is_waited_for_up_to_the_cap(web: Any, pages: Any) -> None:
    web.pages["/soon"] = pages.in_turn(pages.answer(429, b"", "Retry-After: 1"), pages.answer(200, b"fine"))
    web.pages["/late"] = pages.answer(503, b"", "Retry-After: 3600")
    started = time.monotonic()
    soon, late = fetch(f"{web.url}/soon", f"{web.url}/late", max_retry_after_s=2)
    assert 1.0 <= time.monotonic() - started < 3.0
    assert soon.result == b"fine"
    assert (late.reason, late.requests, late.retry_after_s) == (Reason.SERVER_ERROR, 1, 3600.0)


def test_backoff_doubles_up_to_its_cap_and_varies() -> None:
    async def waits() -> list[list[float | None]]:
        config = FetchConfig(retries=6, backoff_s=1, max_backoff_s=8)
        fetcher: Fetcher[bytes] = Fetcher(config, 1, keep)
        failed = Answer(Reason.TIMEOUT)
        return [[fetcher._wait_before_retry(failed, attempt) for _ in range(50)] for attempt in range(7)]

    measured = asyncio.run(waits())
    for centre, seconds in zip((1, 2, 4, 8, 8, 8), measured, strict=False):
        assert 0.5 * centre <= min(seconds) < max(seconds) <= 1.5 * centre
    assert measured[6] == [None] * 50


def test_requests_in_flight_are_bounded_per_host_and_in_all(web: Any, pages: Any) -> None:
    for number in range(12):
        web.pages[f"/{number}"] = pages.answer(200, b"x", delay_s=0.05)
    urls = [f"{web.url}/{number}" for number in range(12)]
    assert all(got.result == b"x" for got in fetch(*urls, connections_per_domain=3, timeout_s=5))
    assert web.most_in_flight == 3
    assert web.connections == 3  # kept alive
    web.most_in_flight = 0
    fetch(*urls, connections_per_domain=9, concurrency_per_worker=5, timeout_s=5)
    assert web.most_in_flight == 5


def test_bodies_in_flight_are_bounded_in_bytes(web: Any, pages: Any) -> None:
    held, most = 0, 0

    async def run() -> None:
        config = FetchConfig(
            allow_networks=LOOPBACK, max_bytes_in_flight=2500, timeout_s=0.3, robots_txt=False, concurrency_per_worker=8
        )
        async with Fetcher(config, 1000, handle) as fetcher:
            await asyncio.gather(*(fetcher.fetch(f"{web.url}/{number}") for number in range(8)))

    async def handle(body: bytes) -> None:
        nonlocal held, most
        held += len(body)
        most = max(most, held)
        await asyncio.sleep(0.1)
        held -= len(body)

    for number in range(8):
        web.pages[f"/{number}"] = pages.answer(200, b"x" * 1000)
    asyncio.run(run())
    # Waiting for memory took longer than the deadline of an attempt, and is not counted in it.
    assert most == 2000
    assert sum(web.requests.values()) == 8


def test_a_page_that_has_not_changed_costs_no_body(web: Any, pages: Any) -> None:
    web.pages["/a"] = pages.answer(304, b"", 'ETag: "v1"')
    (same,) = fetch(f"{web.url}/a", validators=Validators('"v1"', "Mon, 01 Jan 2024 00:00:00 GMT"))
    assert same == Fetched(status=304, requests=1, etag='"v1"', not_modified=True)
    assert web.headers["/a"]["if-none-match"] == '"v1"'
    assert web.headers["/a"]["if-modified-since"] == "Mon, 01 Jan 2024 00:00:00 GMT"
    web.pages["/a"] = pages.answer(200, b"new", 'ETag: "v2"')
    (new,) = fetch(f"{web.url}/a", validators=Validators('"v1"'))
    assert (new.result, new.etag, new.not_modified) == (b"new", '"v2"', False)
    web.pages["/a"] = pages.answer(304, b"", "X-Robots-Tag: noai")
    (closed,) = fetch(f"{web.url}/a", validators=Validators('"v1"'))
    assert (closed.reason, closed.not_modified) == (Reason.OPTED_OUT, False)


def test_a_body_below_the_least_size_is_refused_with_or_without_a_length(web: Any, pages: Any) -> None:
    async def without_length(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxx\r\n0\r\n\r\n")

    web.pages["/length"], web.pages["/chunked"] = pages.answer(200, b"xx"), without_length
    web.pages["/enough"] = pages.answer(200, b"xxx")
    small = fetch(f"{web.url}/length", f"{web.url}/chunked", f"{web.url}/enough", min_bytes=3)
    assert [got.reason for got in small] == [Reason.BODY_TOO_SMALL, Reason.BODY_TOO_SMALL, None]


def test_a_trickle_costs_one_deadline_or_less_and_is_not_tried_again(web: Any, pages: Any) -> None:
    web.pages["/a"] = pages.trickle
    started = time.monotonic()
    slow, late = (
        fetch(f"{web.url}/a", retries=2, **times)[0]
        for times in ({"timeout_s": 5.0, "min_rate_grace_s": 0.2}, {"timeout_s": 0.4})
    )
    assert (slow.reason, slow.requests, slow.status) == (Reason.TOO_SLOW, 1, 200)
    assert (late.reason, late.requests, late.status) == (Reason.TIMEOUT, 1, 200)
    assert time.monotonic() - started < 2.5


def test_a_steady_body_above_the_minimum_rate_is_left_in_peace(web: Any, pages: Any) -> None:
    async def steady(writer: asyncio.StreamWriter, number: int) -> None:
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 2000\r\n\r\n")
        for _ in range(10):
            writer.write(b"x" * 200)
            await writer.drain()
            await asyncio.sleep(0.05)

    web.pages["/a"] = steady
    (got,) = fetch(f"{web.url}/a", timeout_s=5, min_rate_grace_s=0.1, min_bytes_per_second=2000)
    assert got.result == b"x" * 2000


def test_a_failing_host_is_left_alone_and_others_are_not(web: Any, pages: Any) -> None:
    web.pages["/a"] = pages.answer(200, b"x")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound, never listening
        gone = f"http://127.0.0.1:{held.getsockname()[1]}"
        urls = [f"{gone}/{number}" for number in range(20)]
        got = fetch(*urls, f"{web.url}/a", breaker_failures=3, connections_per_domain=2, retries=0)
    reasons = [each.reason for each in got[:-1]]
    assert reasons.count(Reason.CONNECT_ERROR) <= 4  # three, and one that was on its way
    assert set(reasons[4:]) == {Reason.HOST_UNAVAILABLE}
    assert got[-1].result == b"x"


def test_a_host_that_recovers_is_found_by_a_probe(web: Any, pages: Any) -> None:
    web.pages["/a"] = pages.in_turn(pages.hang_up, pages.hang_up, pages.answer(200, b"x"))

    async def run() -> list[Fetched[bytes]]:
        config = FetchConfig(
            allow_networks=LOOPBACK, breaker_failures=2, breaker_open_s=0.3, retries=0, robots_txt=False
        )
        async with Fetcher(config, MAX_BYTES, keep) as fetcher:
            early = [await fetcher.fetch(f"{web.url}/a") for _ in range(3)]
            await asyncio.sleep(0.35)
            return [*early, await fetcher.fetch(f"{web.url}/a"), await fetcher.fetch(f"{web.url}/a")]

    got = asyncio.run(run())
    assert [each.reason for each in got] == [Reason.CONNECT_ERROR] * 2 + [Reason.HOST_UNAVAILABLE, None, None]


def test_a_retry_after_holds_for_all_links_of_the_domain(web: Any, pages: Any) -> None:
    web.pages["/busy"] = pages.in_turn(pages.answer(429, b"", "Retry-After: 1"), pages.answer(200, b"x"))
    web.pages["/other"] = pages.answer(200, b"x")
    started = time.monotonic()
    got = fetch(f"{web.url}/busy", f"{web.url}/other", connections_per_domain=1)
    assert [each.result for each in got] == [b"x", b"x"]
    assert time.monotonic() - started >= 1.0


def test_an_error_of_the_handler_reaches_the_caller_and_gives_the_bytes_back(web: Any, pages: Any) -> None:
    web.pages["/a"] = pages.answer(200, b"x" * 100)

    async def fail(body: bytes) -> None:
        raise RuntimeError("decoder gone")

    async def run() -> int:
        async with Fetcher(FetchConfig(allow_networks=LOOPBACK, robots_txt=False), 100, fail) as fetcher:
            with pytest.raises(RuntimeError, match="decoder gone"):
                await fetcher.fetch(f"{web.url}/a")
            return fetcher._budget.used

    assert asyncio.run(run()) == 0


def test_robots_txt_is_asked_for_once_and_obeyed_on_the_way_too(web: Any, pages: Any) -> None:
    web.pages["/robots.txt"] = pages.answer(200, b"User-agent: *\nDisallow: /closed/\n")
    web.pages["/open"] = pages.answer(200, b"x")
    web.pages["/closed/a"] = pages.answer(200, b"x")
    web.pages["/to"] = pages.redirect("/closed/a")
    paths = ["/open", "/closed/a", "/to"]
    got = fetch(*(web.url + path for path in paths), robots_txt=True)
    assert [each.reason for each in got] == [None, Reason.ROBOTS_DISALLOWED, Reason.ROBOTS_DISALLOWED]
    assert [each.requests for each in got] == [1, 0, 1]
    assert web.requests == {"/robots.txt": 1, "/open": 1, "/to": 1}


@pytest.mark.parametrize(
    ("robots", "reason", "requests"),
    [
        (lambda p: p.answer(404), None, 1),
        (lambda p: p.answer(403, b"User-agent: *\nDisallow: /"), None, 1),
        (lambda p: p.redirect("/robots.txt"), None, 6),  # no end: as if there were none
        (lambda p: p.answer(200, b"", "X-Robots-Tag: noindex", "tdm-reservation: 1"), None, 1),  # of the file itself
        (lambda p: p.answer(500), Reason.HOST_UNAVAILABLE, 2),
        (lambda p: p.answer(429), Reason.HOST_UNAVAILABLE, 2),
        (lambda p: p.in_turn(p.answer(503), p.answer(200)), None, 2),
        (lambda p: p.gzipped(b""), Reason.HOST_UNAVAILABLE, 1),
        (lambda p: p.redirect("http://10.0.0.1/robots.txt"), Reason.HOST_UNAVAILABLE, 1),
        (lambda p: p.hang, Reason.TIMEOUT, 2),
        (lambda p: p.hang_up, Reason.CONNECT_ERROR, 2),
    ],
)
def test_a_robots_txt_that_cannot_be_read(
    web: Any, pages: Any, robots: Any, reason: Reason | None, requests: int
) -> None:
    web.pages["/robots.txt"] = robots(pages)
    web.pages["/a"] = web.pages["/b"] = pages.answer(200, b"x")
    got = fetch(f"{web.url}/a", f"{web.url}/b", robots_txt=True)
    assert [each.reason for each in got] == [reason, reason]
    assert [each.requests for each in got] == [0 if reason else 1] * 2
    assert web.requests["/robots.txt"] == requests


def test_of_a_long_robots_txt_the_beginning_counts(web: Any, pages: Any) -> None:
    rules = b"User-agent: *\nDisallow: /early\n" + b"#" * (500 * 1024) + b"\nDisallow: /late\n"
    web.pages["/robots.txt"] = pages.answer(200, rules)
    web.pages["/late"] = pages.answer(200, b"x")
    got = fetch(f"{web.url}/early", f"{web.url}/late", robots_txt=True, timeout_s=5)
    assert [each.reason for each in got] == [Reason.ROBOTS_DISALLOWED, None]


def test_a_name_that_does_not_resolve_says_so_also_where_its_robots_txt_is_asked_for_first() -> None:
    (got,) = fetch("http://nobody.invalid/a", retries=0, timeout_s=20, robots_txt=True)
    assert (got.reason, got.requests) == (Reason.DNS_FAILURE, 0)
