"""Whom a host belongs to."""

import pytest

from pipelines.domains import registered_domain


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("example.com", "example.com"),
        ("a.b.example.com", "example.com"),
        ("img.example.co.uk", "example.co.uk"),
        ("A.Example.COM.", "example.com"),
        ("one.github.io", "one.github.io"),  # the private section: two owners
        ("deep.two.github.io", "two.github.io"),
        ("xn--bcher-kva.example.de", "example.de"),
        ("www.example.xn--p1ai", "example.xn--p1ai"),
        ("github.io", "github.io"),  # a suffix stands for itself
        ("com", "com"),
        ("localhost", "localhost"),
        ("a.b.nosuchsuffix", "b.nosuchsuffix"),
        ("10.1.2.3", "10.1.2.3"),
        ("10.1.2.4", "10.1.2.4"),
        ("2001:db8::1", "2001:db8::1"),
        ("fe80::1", "fe80::1"),
        ("", ""),
    ],
)
def test_the_registered_domain(host: str, domain: str) -> None:
    assert registered_domain(host) == domain
