"""The registered domain of a host: whom the limits of politeness are for."""

from functools import lru_cache
from ipaddress import ip_address

from publicsuffixlist import PublicSuffixList


@lru_cache(maxsize=1 << 17)
def registered_domain(host: str) -> str:
    """What its owner registered: ``img.example.co.uk`` belongs to ``example.co.uk``.

    The private section of the public suffix list counts too: ``a.github.io`` and ``b.github.io`` belong to two owners,
    and one limit for all that a hoster serves would starve both. IP literals, public suffixes themselves and names
    without a dot stand for themselves. ``host`` as in a canonical url: lower case, IDNA, without brackets.
    """
    name = host.rstrip(".").lower()
    if _is_literal(name):
        return name
    return _suffixes().privatesuffix(name) or name


def _is_literal(host: str) -> bool:
    if ":" not in host and not host[-1:].isdigit():
        return False
    try:
        ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


@lru_cache(maxsize=1)
def _suffixes() -> PublicSuffixList:
    return PublicSuffixList()
