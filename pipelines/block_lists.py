"""Block lists: domains, urls and digests that are refused. One entry a line, ``#`` for comments, ``.gz`` allowed.

An entry costs 16 bytes of memory in a list of domains or urls (a 128-bit digest of the entry) and the length of its
digest in a list of hashes: 16 (MD5), 20 (SHA-1) or 32 (SHA-256). The arrays are sorted and found in by bisection;
pickled with protocol 5, as Ray does, they are shared between processes and not copied.
"""

import hashlib
import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

import numpy as np
import pyarrow as pa

from coca.contract import canonical_url
from coca.errors import BadInput
from coca.storage import open_file
from pipelines.canonical_urls import canonical_urls

T = TypeVar("T")

_LINES_AT_ONCE = 100_000


class DigestSet:
    """Digests of one length as a sorted array.

    Args:
        packed: the digests end to end, in any order.
        width: bytes of one digest.
    """

    def __init__(self, packed: bytes | bytearray, width: int) -> None:
        self.digests = np.unique(np.frombuffer(packed, dtype=f"S{width}"))
        self.width = width

    def __len__(self) -> int:
        return len(self.digests)

    def holds(self, packed: bytes | bytearray) -> np.ndarray:
        """Which of the digests, end to end, are in the set: (N,) bool."""
        asked = np.frombuffer(packed, dtype=f"S{self.width}")
        if not len(self):
            return np.zeros(len(asked), dtype=bool)
        places = np.minimum(np.searchsorted(self.digests, asked), len(self) - 1)
        return np.asarray(self.digests[places] == asked)


class BlockedDomains:
    """Domains, each with all its subdomains."""

    def __init__(self, domains: Iterable[str]) -> None:
        self._domains = DigestSet(_pack(domains), 16)

    def __len__(self) -> int:
        return len(self._domains)

    def matches(self, hosts: Sequence[str]) -> np.ndarray:
        """Which hosts of *canonical* urls (no port) are on the list or below a domain on it: (N,) bool."""
        names = [_with_parents(host.rstrip(".")) for host in hosts]
        if not names:
            return np.zeros(0, dtype=bool)
        held = self._domains.holds(_pack(itertools.chain.from_iterable(names)))
        starts = np.cumsum([0] + [len(group) for group in names[:-1]])
        return np.asarray(np.logical_or.reduceat(held, starts))


class BlockedUrls:
    """Urls, compared in canonical form."""

    def __init__(self, urls: Iterable[str]) -> None:
        self._urls = DigestSet(_pack(urls), 16)

    def __len__(self) -> int:
        return len(self._urls)

    def matches(self, urls: Sequence[str]) -> np.ndarray:
        """Which *canonical* urls are on the list: (N,) bool."""
        return self._urls.holds(_pack(urls))


class BlockedHashes:
    """MD5, SHA-1 and SHA-256 digests of source bytes."""

    def __init__(self, digests: Iterable[bytes]) -> None:
        packed: dict[int, bytearray] = {16: bytearray(), 20: bytearray(), 32: bytearray()}
        for digest in digests:
            packed[len(digest)] += digest
        self._sets = {width: DigestSet(each, width) for width, each in packed.items() if each}

    def __len__(self) -> int:
        return sum(map(len, self._sets.values()))

    def matches(self, body: bytes) -> bool:
        """Whether a body has a digest on the list; only the kinds that the list holds are computed."""
        return any(
            bool(held.holds(hashlib.new(_KINDS[width], body, usedforsecurity=False).digest())[0])
            for width, held in self._sets.items()
        )


def load_blocked_domains(uri: str) -> BlockedDomains:
    """
    Raises:
        BadInput: no such file, nothing in it, or a line that is no domain.
    """
    return BlockedDomains(_entries(uri, _read_domains))


def load_blocked_urls(uri: str) -> BlockedUrls:
    """
    Raises:
        BadInput: no such file, nothing in it, or a line that is no http(s) url.
    """
    return BlockedUrls(_entries(uri, _read_urls))


def load_blocked_hashes(uri: str) -> BlockedHashes:
    """
    Raises:
        BadInput: no such file, nothing in it, or a line that is no digest.
    """
    return BlockedHashes(_entries(uri, _read_hashes))


def read_lines(uri: str) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a list that hold an entry, without comments and surrounding whitespace.

    Raises:
        BadInput: no such file, not UTF-8, a damaged .gz, or no entry at all.
    """
    store, name = open_file(uri)
    found = False
    try:
        compression = "gzip" if name.endswith(".gz") else None
        with store.filesystem.open_input_stream(store.path(name), compression=compression) as stream:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), start=1):
                entry = line.strip()
                if entry and not entry.startswith("#"):
                    found = True
                    yield number, entry
    except UnicodeDecodeError:
        raise BadInput(f"the list {uri} is not UTF-8 text", "Save it as UTF-8") from None
    except (OSError, pa.ArrowInvalid) as error:
        problem = str(error).splitlines()[0]
        raise BadInput(f"the list {uri} cannot be read: {problem}", "Check its path, and that it is whole") from None
    if not found:
        raise BadInput(f"the list {uri} holds no entry", "Write one a line, or leave the setting away")


_PLAIN_DOMAIN = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
# A path, a query, a pattern, or a port.
_NO_DOMAIN = re.compile(r"[/?#*\[\]\\]|^[^:]*:[^:]*$")

_KINDS = {16: "md5", 20: "sha1", 32: "sha256"}


def _pack(texts: Iterable[str]) -> bytearray:
    """128-bit digests of texts, end to end: among 1e7 entries, 1e10 lookups meet a false one with p < 1e-21."""
    packed = bytearray()
    for text in texts:
        packed += hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return packed


def _with_parents(host: str) -> list[str]:
    """``a.b.c`` as itself, ``b.c`` and ``c``. A host has at most 127 labels; more is no name that resolves."""
    names = [host]
    place = host.find(".")
    while place >= 0 and len(names) < 127:
        names.append(host[place + 1 :])
        place = host.find(".", place + 1)
    return names


def _entries(uri: str, read: Callable[[str, list[tuple[int, str]]], Iterable[T]]) -> Iterator[T]:
    lines = read_lines(uri)
    while batch := list(itertools.islice(lines, _LINES_AT_ONCE)):
        yield from read(uri, batch)


def _read_domains(uri: str, lines: list[tuple[int, str]]) -> Iterator[str]:
    for number, entry in lines:
        if _PLAIN_DOMAIN.fullmatch(entry):
            yield entry
            continue
        host = f"[{entry}]" if entry.count(":") > 1 else entry  # an IPv6 address
        url = canonical_url(f"http://{host}/")
        name = url[len("http://") : -1].rstrip(".") if url else ""
        if not name or name.startswith(".") or _NO_DOMAIN.search(entry):
            _refuse(
                uri, number, entry, "domain", "List the domain alone, like example.com: its subdomains are included"
            )
        yield name


def _read_urls(uri: str, lines: list[tuple[int, str]]) -> Iterator[str]:
    for (number, entry), url in zip(lines, canonical_urls([entry for _, entry in lines]), strict=True):
        if url is None:
            _refuse(uri, number, entry, "http(s) url", "Write urls whole, like https://example.com/a.jpg")
        yield url


def _read_hashes(uri: str, lines: list[tuple[int, str]]) -> Iterator[bytes]:
    for number, entry in lines:
        try:
            digest = bytes.fromhex(entry)
        except ValueError:
            digest = b""
        if len(entry) != 2 * len(digest) or len(digest) not in _KINDS:
            _refuse(uri, number, entry, "digest", "Write MD5, SHA-1 or SHA-256 as 32, 40 or 64 hex digits, one a line")
        yield digest


def _refuse(uri: str, number: int, entry: str, kind: str, way_out: str) -> NoReturn:
    shown = repr(entry if len(entry) <= 80 else entry[:77] + "...")
    raise BadInput(f"{uri}, line {number}: {shown} is no {kind}", way_out)
