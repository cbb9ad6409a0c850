"""Canonical urls by the column."""

import itertools
import random
import time

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from coca.contract import canonical_url
from pipelines.canonical_urls import _CANONICAL, canonical_urls

HEADS = ["http://", "https://", "HTTP://", "http:/", "ftp://", "//", "http:"]
HOSTS = [
    "a",
    "a.b",
    "A.b",
    "a_b-c.d",
    "a:80",
    "a:8080",
    "u@a",
    "[::1]",
    "bücher.de",
    "",
    ".",
    "a..b",
    "a%41",
    "a b",
    "a\\b",
]
PATHS = [
    "",
    "/",
    "//",
    "/a",
    "/%41",
    "/%2F",
    "/%2f",
    "/%7E",
    "/%20",
    "/%zz",
    "/%",
    "/a b",
    "/é",
    "/[x]",
    "/a;b",
    "/./..",
    "/\t",
]
TAILS = [
    "",
    "?",
    "??",
    "?a",
    "?a?b",
    "?a=%41",
    "?a=%26",
    "#",
    "#a",
    "?#a",
    "?a#b",
    " ",
    "\n",
    "?\\",
    "?'\"",
    "?|",
    "?^",
]


def test_every_url_comes_out_as_the_contract_says() -> None:
    urls = ["".join(parts) for parts in itertools.product(HEADS, HOSTS, PATHS, TAILS)]
    assert canonical_urls(urls) == [canonical_url(url) for url in urls]


def test_random_urls_come_out_as_the_contract_says() -> None:
    rng = random.Random(0)
    signs = [chr(code) for code in range(0x21, 0x7F)] + ["%41", "%2F", "%e9", "%5B", "%60", "\x7f", "é", "%2D", "%3A"]
    urls = [f"http://a.b/{''.join(rng.choices(signs, k=6))}" for _ in range(50_000)]
    assert canonical_urls(urls) == [canonical_url(url) for url in urls]


def test_the_short_way_is_taken() -> None:
    usual = ["https://cdn.example.com/a/b-1.jpg?v=1&w=2", "http://a/", "http://a/%20x%E9"]
    assert pc.match_substring_regex(pa.array(usual), _CANONICAL).to_pylist() == [True] * 3


@pytest.mark.parametrize("url", [None, "", "http://a/\ufffd.jpg"])
def test_no_url(url: str | None) -> None:
    assert canonical_urls([url]) == [None]


def test_no_rows() -> None:
    assert canonical_urls([]) == []


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("http://a/" + "%" * 500_000, "http://a/" + "%25" * 500_000),
        ("http://a/" + "é" * 500_000, "http://a/" + "%C3%A9" * 500_000),
        ("http://a/?" + "?" * 1_000_000 + "#", "http://a/?" + "?" * 1_000_000),
        (" http://" + "é" * 500_000 + "/", None),
        ("http://" + "é." * 500_000, None),
        ("http://" + "a." * 500_000, None),
        ("http://[" + ":" * 1_000_000 + "]/", None),
        (" " * 1_000_000, None),
    ],
    ids=["percents", "letters", "query", "host", "labels", "plain labels", "address", "spaces"],
)
def test_hostile_urls_take_no_time(url: str, canonical: str | None) -> None:
    started = time.process_time()
    assert canonical_urls([url]) == [canonical]
    assert time.process_time() - started < 1
