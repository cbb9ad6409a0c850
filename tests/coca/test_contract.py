"""Keys of the contract: golden, because every stored dataset depends on them."""

import pytest

from coca.contract import canonical_url, link_bucket, sample_id


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("HTTP://Example.COM:80/a%7eb?x=1#part", "http://example.com/a~b?x=1"),
        ("https://example.com:443", "https://example.com/"),
        ("http://example.com:8080/x", "http://example.com:8080/x"),
        ("http://example.com/a%2Fb", "http://example.com/a%2Fb"),
        ("http://example.com/a%2fb", "http://example.com/a%2Fb"),
        ("http://example.com/a b%", "http://example.com/a%20b%25"),
        ("https://bücher.example/ü", "https://xn--bcher-kva.example/%C3%BC"),
        ("http://[2001:DB8::1]:8080/x", "http://[2001:db8::1]:8080/x"),
        ("  http://example.com/x\n", "http://example.com/x"),
        ("ftp://example.com/x", None),
        ("http://user:password@example.com/", None),
        ("http://", None),
        ("http://exa mple.com/", None),
        ("http://example.com:99999/", None),
        ("not a url", None),
        ("", None),
    ],
)
def test_canonical_url(url: str, expected: str | None) -> None:
    assert canonical_url(url) == expected
    if expected is not None:
        assert canonical_url(expected) == expected


def test_keys_are_golden() -> None:
    assert sample_id("http://example.com/", "a cat") == "20ba2844c44fdf3336cc2e51fdf65d22"
    assert link_bucket("http://example.com/") == "dd"
    assert sample_id("http://example.com/", "a dog") != sample_id("http://example.com/", "a cat")
