"""What one request is made of: headers read, redirects resolved, statuses judged."""

from email.utils import formatdate

import pytest

from coca.contract import Reason
from pipelines.request import (
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
