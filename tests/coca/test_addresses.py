"""Which hosts may be reached, also where an address hides in another."""

import socket

import pytest

from coca.addresses import (
    ForbiddenAddress,
    is_allowed,
    is_destination_allowed,
    parse_networks,
    socket_factory,
)
from coca.errors import BadInput


@pytest.mark.parametrize(
    "ip",
    [
        "8.8.8.8",
        "2606:4700:4700::1111",
        "2a00:1450:4001::200e",
        "::ffff:8.8.8.8",
        "64:ff9b::808:808",
        "2002:808:808::1",
    ],
)
def test_global_unicast_is_allowed(ip: str) -> None:
    assert is_allowed(ip)


@pytest.mark.parametrize(
    "ip",
    [
        "0.0.0.0",
        "10.0.0.1",
        "100.64.0.1",
        "127.0.0.1",
        "127.8.9.1",
        "169.254.169.254",
        "172.16.0.1",
        "192.0.0.9",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12:3456::1",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
        "2001:db8::1",
        "3fff::1",
        "5f00::1",
        "64:ff9b:1::a00:1",
    ],
)
def test_everything_else_is_not(ip: str) -> None:
    assert not is_allowed(ip)


@pytest.mark.parametrize(
    "ip",
    [
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "2002:7f00:1::1",
        "2002:a00:1::",
        "2001:0:7f00:1::f7f7:f7f7",  # a Teredo server on loopback
        "2001:0:808:808::80ff:fffe",  # a Teredo client on loopback (its bits are inverted)
    ],
)
def test_an_address_inside_an_address_is_seen(ip: str) -> None:
    assert not is_allowed(ip)


def test_a_configured_network_opens_its_own_addresses_and_ports_only() -> None:
    loopback = parse_networks(["127.0.0.0/8", "::1/128"])
    assert is_allowed("127.0.0.1", loopback)
    assert is_allowed("::1", loopback)
    assert is_allowed("::ffff:127.0.0.1", loopback)
    assert not is_allowed("10.0.0.1", loopback)
    assert is_destination_allowed("127.0.0.1", 6379, loopback)
    assert not is_destination_allowed("8.8.8.8", 6379, loopback)


def test_ports_of_the_web_only() -> None:
    allowed = [port for port in (21, 22, 25, 80, 443, 6379, 8080, 8265) if is_destination_allowed("8.8.8.8", port)]
    assert allowed == [80, 443]


@pytest.mark.parametrize("text", ["localhost", "127.0.0.1/33", "10.0.0.1/8", "", "::/129"])
def test_a_network_that_is_none(text: str) -> None:
    with pytest.raises(BadInput, match="is not a network in CIDR notation"):
        parse_networks([text])


def test_no_socket_is_made_for_a_forbidden_destination(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(socket, "socket", lambda *arguments: made.append(arguments))
    factory = socket_factory(())
    info = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 80))
    with pytest.raises(ForbiddenAddress):
        factory(info)
    with pytest.raises(ForbiddenAddress):
        factory((socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 80, 0, 2)))
    assert made == []
    factory((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("8.8.8.8", 443)))
    assert made == [(socket.AF_INET, socket.SOCK_STREAM, 6)]
