"""Which hosts may be reached: only global unicast addresses on web ports, unless a configured network holds them.

Links come from strangers. Without this guard a link to ``169.254.169.254`` or to a dashboard on loopback would be
fetched from inside. The check belongs on the address of the socket about to connect (``checked_socket``): a name
may resolve differently a moment later, and a redirect may lead anywhere.
"""

import errno
import socket
from collections.abc import Callable, Iterable
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from coca.errors import BadInput

IPAddress = IPv4Address | IPv6Address
IPNetwork = IPv4Network | IPv6Network

WEB_PORTS = (80, 443)

_NAT64 = ip_network("64:ff9b::/96")
_GLOBAL_IPV6 = ip_network("2000::/3")  # all that IANA has handed out as global unicast
# Not reachable as plain hosts, yet global to older versions of Python's own table.
_SPECIAL = [
    ip_network(text)
    for text in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")
]


class ForbiddenAddress(OSError):
    """A connection that is refused before it is made."""

    def __init__(self) -> None:
        # One text for all: a client that tries several addresses keeps the type only where the texts agree.
        super().__init__(errno.EACCES, "the address is not allowed")


def parse_networks(networks: Iterable[str]) -> tuple[IPNetwork, ...]:
    """Networks in CIDR notation.

    Raises:
        BadInput: a text that is none.
    """
    parsed = []
    for text in networks:
        try:
            parsed.append(ip_network(text))
        except ValueError as error:
            raise BadInput(
                f"{text!r} is not a network in CIDR notation: {error}", "Write for example 127.0.0.0/8 or ::1/128"
            ) from None
    return tuple(parsed)


def is_allowed(ip: IPAddress | str, allow_networks: Iterable[IPNetwork] = ()) -> bool:
    """Whether a host at ``ip`` may be reached.

    An IPv6 address that carries an IPv4 address (mapped, NAT64, 6to4, Teredo) is judged by what it carries.
    """
    networks = tuple(allow_networks)
    address = ip_address(ip) if isinstance(ip, str) else ip
    if _is_in(address, networks):
        return True
    return all(_is_global_unicast(inner) or _is_in(inner, networks) for inner in _unwrap(address))


def is_destination_allowed(ip: IPAddress | str, port: int, allow_networks: Iterable[IPNetwork] = ()) -> bool:
    """Whether ``port`` at ``ip`` may be reached: 80 and 443, or any port inside a configured network."""
    networks = tuple(allow_networks)
    address = ip_address(ip) if isinstance(ip, str) else ip
    if all(_is_in(inner, networks) for inner in _unwrap(address)) or _is_in(address, networks):
        return True
    return port in WEB_PORTS and is_allowed(address, networks)


def socket_factory(allow_networks: Iterable[IPNetwork]) -> Callable[[Any], socket.socket]:
    """``aiohttp.TCPConnector(socket_factory=...)``: makes sockets for allowed destinations only.

    The factory raises ``ForbiddenAddress``.
    """
    return partial(checked_socket, tuple(allow_networks))


def checked_socket(allow_networks: tuple[IPNetwork, ...], address_info: Any) -> socket.socket:
    """A socket for one entry of ``getaddrinfo``.

    Raises:
        ForbiddenAddress: the entry leads where it must not.
    """
    family, kind, protocol, _, (host, port, *_) = address_info
    if not is_destination_allowed(host, port, allow_networks):
        raise ForbiddenAddress
    return socket.socket(family, kind, protocol)


def _is_in(address: IPAddress, networks: Iterable[IPNetwork]) -> bool:
    return any(address in network for network in networks)


def _unwrap(address: IPAddress) -> tuple[IPAddress, ...]:
    if isinstance(address, IPv4Address):
        return (address,)
    if address.ipv4_mapped is not None:
        return (address.ipv4_mapped,)
    if address in _NAT64:
        return (IPv4Address(int(address) & 0xFFFF_FFFF),)
    if address.sixtofour is not None:
        return (address.sixtofour,)
    if address.teredo is not None:
        return address.teredo  # server and client
    return (address,)


def _is_global_unicast(address: IPAddress) -> bool:
    if not address.is_global or address.is_multicast or address.is_reserved or _is_in(address, _SPECIAL):
        return False
    return isinstance(address, IPv4Address) or address in _GLOBAL_IPV6
