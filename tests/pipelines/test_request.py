"""What one request is made of: headers read, names looked up, statuses judged."""

import asyncio
import socket
from email.utils import formatdate
from typing import Any

import pytest

from coca.contract import Reason
from pipelines.request import (
    Resolver,
    Validators,
    _conditions,
    _target,
    _validator,
    parse_retry_after,
    reason_of_status,
)


def test_retry_after_in_seconds_or_as_a_date() -> None:
    assert parse_retry_after("120", 0) == 120
    assert parse_retry_after(formatdate(1_000_060, usegmt=True), 1_000_000) == 60
    assert parse_retry_after(formatdate(999_000, usegmt=True), 1_000_000) == 0
    assert parse_retry_after("soon", 0) is None
    assert parse_retry_after(None, 0) is None
    assert parse_retry_after("9" * 5000, 0) == float("inf")


def test_every_status_has_its_reason() -> None:
    reasons = {status: reason_of_status(status) for status in (300, 400, 401, 404, 408, 410, 418, 429, 451, 500, 599)}
    assert reasons == {
        300: Reason.CLIENT_ERROR,
        400: Reason.CLIENT_ERROR,
        401: Reason.CLIENT_ERROR,
        404: Reason.NOT_FOUND,
        408: Reason.TIMEOUT,
        410: Reason.NOT_FOUND,
        418: Reason.CLIENT_ERROR,
        429: Reason.RATE_LIMITED,
        451: Reason.CLIENT_ERROR,
        500: Reason.SERVER_ERROR,
        599: Reason.SERVER_ERROR,
    }


@pytest.mark.parametrize("value", [None, "", "\udcff", "ä", "a\tb", "x" * 1025])
def test_a_validator_that_cannot_be_stored_and_sent_back_is_none(value: str | None) -> None:
    assert _validator(value) is None
    assert _conditions(Validators(value, value)) == {}


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/b", "http://a.example/b"),
        ("//b.example/c", "http://b.example/c"),
        ("c?d#e", "http://a.example/x/c?d"),
        ("https://b.example/ä", "https://b.example/%C3%A4"),
        ("http://[::1/", None),
        ("http://b.example:port/", None),
        ("http://b.example/\udcff", None),
        ("javascript:alert(1)", None),
        ("data:image/png;base64,AAAA", None),
    ],
)
def test_where_a_redirect_leads(location: str, target: str | None) -> None:
    assert _target("http://a.example/x/y", location) == target


def test_a_name_is_looked_up_once_for_all_and_failures_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def look_up(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        if host == "gone.example":
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", port))]

    async def run() -> None:
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
        resolver = Resolver(threads=2, cache_s=0.2)
        many = await asyncio.gather(*(resolver.resolve("a.example", 80) for _ in range(10)))
        assert {(found[0]["host"], found[0]["port"], found[0]["hostname"]) for found in many} == {
            ("192.0.2.1", 80, "a.example")
        }
        for _ in range(3):
            with pytest.raises(socket.gaierror):
                await resolver.resolve("gone.example", 80)
        assert asked == ["a.example", "gone.example"]
        await asyncio.sleep(0.25)
        await resolver.resolve("a.example", 80)
        assert asked == ["a.example", "gone.example", "a.example"]
        await resolver.close()

    asyncio.run(run())
