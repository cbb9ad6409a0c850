"""Canonical urls by the column: most links are canonical as they come, and one regular expression can tell."""

import re
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import canonical_url

# Urls that `canonical_url` returns as they are: lower-case host without port, a path, only characters that need no
# quoting, escapes only of bytes that need one, and no empty query.
_PLAIN = r"[A-Za-z0-9!$&'()*+,;=:@/\-._~\[\]]"
_ESCAPE = r"%(?:[0189A-F][0-9A-F]|2[0-9A-CF]|3[A-F]|40|5[B-E]|60|7[B-DF])"
_CANONICAL = rf"^https?://[a-z0-9._\-]+/(?:{_PLAIN}|{_ESCAPE})*(?:\?(?:{_PLAIN}|\?|{_ESCAPE})+)?$"

# No name is half as long, and the IDNA codec would read a megabyte of it at a microsecond a character.
_LONG_HOST = re.compile(r"\s*https?:/*[^/?#]{1000}", re.IGNORECASE)


def canonical_urls(urls: Sequence[str | None]) -> list[str | None]:
    """:func:`coca.contract.canonical_url` of each, None also for None.

    A url with U+FFFD has lost bytes where it was decoded: it names nothing, and comes out as None. So does a host of
    1,000 characters or more.
    """
    is_canonical = pc.match_substring_regex(pa.array(urls, pa.string()), _CANONICAL).to_pylist()
    return [url if plain else _canonical(url) for url, plain in zip(urls, is_canonical, strict=True)]


def _canonical(url: str | None) -> str | None:
    if not url or "\ufffd" in url or _LONG_HOST.match(url):
        return None
    return canonical_url(url)
