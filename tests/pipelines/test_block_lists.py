"""Block lists of domains, urls and digests."""

import gzip
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coca.errors import BadInput
from pipelines.block_lists import (
    BlockedHashes,
    DigestSet,
    load_blocked_domains,
    load_blocked_hashes,
    load_blocked_urls,
)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write_list(text: str, name: str = "list.txt") -> str:
        data = text.encode("utf-8")
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return str(tmp_path / name)

    return write_list


@pytest.mark.parametrize(
    ("host", "blocked"),
    [
        ("bad.example", True),
        ("www.bad.example", True),
        ("a.b.c.bad.example", True),
        ("notbad.example", False),
        ("bad.example.org", False),
        ("example", False),
        ("bad.example.", True),
        ("sub.upper.example", True),
        ("xn--bcher-kva.example", True),
        ("img.xn--bcher-kva.example", True),
        ("10.0.0.1", True),
        ("1.10.0.0.1", True),
        ("10.0.0.2", False),
        ("[2001:db8::1]", True),
        ("[2001:db8::2]", False),
        ("a.whole-tld", True),
        (".".join(["a"] * 500) + ".bad.example", False),
        ("", False),
    ],
)
def test_a_domain_and_all_below_it(write: Any, host: str, blocked: bool) -> None:
    entries = "bad.example\nUPPER.example.\nbücher.example\n10.0.0.1\n2001:db8::1\nwhole-tld\n"
    assert load_blocked_domains(write(entries)).matches([host]).tolist() == [blocked]


def test_many_hosts_at_once(write: Any) -> None:
    domains = load_blocked_domains(write("bad.example\n"))
    assert domains.matches(["a.example", "x.bad.example", "b", "bad.example"]).tolist() == [False, True, False, True]
    assert domains.matches([]).tolist() == []


def test_urls_in_canonical_form(write: Any) -> None:
    urls = load_blocked_urls(write("HTTP://Bad.example:80/%7Ea.jpg#top\nhttps://bad.example/b?q=1\n"))
    asked = ["http://bad.example/~a.jpg", "https://bad.example/~a.jpg", "https://bad.example/b?q=1", "http://b/"]
    assert len(urls) == 2
    assert urls.matches(asked).tolist() == [True, False, True, False]
    assert urls.matches([]).tolist() == []


@pytest.mark.parametrize("kinds", [["md5"], ["sha1"], ["sha256"], ["md5", "sha1", "sha256"]])
def test_digests_of_every_kind(write: Any, kinds: list[str]) -> None:
    bodies = {kind: f"picture {kind}".encode() for kind in kinds}
    lines = [hashlib.new(kind, body).hexdigest() for kind, body in bodies.items()]
    hashes = load_blocked_hashes(write("\n".join([lines[0].upper(), *lines[1:]]), "list.txt.gz"))
    assert len(hashes) == len(kinds)
    assert all(hashes.matches(body) for body in bodies.values())
    assert not hashes.matches(b"another picture")
    assert pickle.loads(pickle.dumps(hashes)).matches(bodies[kinds[0]])


def test_no_hashes_match_nothing() -> None:
    assert not BlockedHashes([]).matches(b"")


def test_digests_that_begin_or_end_in_zeros_are_told_apart() -> None:
    digests = [b"\x00" * 16, b"\x00" * 15 + b"\x01", b"\x01" + b"\x00" * 15, b"\xff" * 16, b"a" * 15 + b"\x00"]
    held = DigestSet(b"".join(digests), 16)
    assert len(held) == 5
    assert held.digests.itemsize == 16
    assert held.holds(b"".join(digests)).all()
    assert not held.holds(b"\x00" * 14 + b"\x01\x00" + b"a" * 14 + b"\x00\x00").any()
    assert DigestSet(b"", 16).holds(digests[0]).tolist() == [False]


def test_comments_blank_lines_and_repeated_entries(write: Any) -> None:
    text = "\ufeff# a list\n\n  bad.example  \nbad.example\r\n# worse.example\n"
    domains = load_blocked_domains(write(text))
    assert len(domains) == 1
    assert domains.matches(["bad.example", "worse.example"]).tolist() == [True, False]


@pytest.mark.parametrize(
    ("load", "line", "message"),
    [
        (load_blocked_domains, "http://bad.example/", "is no domain.*List the domain alone"),
        (load_blocked_domains, "0.0.0.0 bad.example", "is no domain"),
        (load_blocked_domains, "*.bad.example", "is no domain.*its subdomains are included"),
        (load_blocked_domains, ".bad.example", "is no domain"),
        (load_blocked_domains, "bad.example:80", "is no domain"),
        (load_blocked_domains, "bad.example/path", "is no domain"),
        (load_blocked_domains, "bad.example?", "is no domain"),
        (load_blocked_domains, "bad.example#x", "is no domain"),
        (load_blocked_domains, ".", "is no domain"),
        (load_blocked_urls, "bad.example/a.jpg", r"is no http\(s\) url"),
        (load_blocked_hashes, "abc", "is no digest.*32, 40 or 64 hex digits"),
        (load_blocked_hashes, "g" * 32, "is no digest"),
        (load_blocked_hashes, "0" * 30, "is no digest"),
        (load_blocked_hashes, "ab " * 16, "is no digest"),
        (load_blocked_hashes, "0" * 32 + " name.jpg", "is no digest"),
    ],
)
def test_a_wrong_line_is_named(write: Any, load: Callable[[str], Any], line: str, message: str) -> None:
    with pytest.raises(BadInput, match=rf"list.txt, line 2: {message}|line 2.*{message}"):
        load(write(f"# first\n{line}\n"))


def test_lists_that_cannot_be_read(write: Any, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"absent.txt cannot be read"):
        load_blocked_domains(str(tmp_path / "absent.txt"))
    with pytest.raises(BadInput, match=r"holds no entry"):
        load_blocked_domains(write("# nothing\n"))
    (tmp_path / "latin.txt").write_bytes(b"b\xfccher.example\n")
    with pytest.raises(BadInput, match=r"latin.txt is not UTF-8"):
        load_blocked_domains(str(tmp_path / "latin.txt"))
    (tmp_path / "cut.gz").write_bytes(gzip.compress(b"bad.example\n" * 9999)[:-20])
    with pytest.raises(BadInput, match=r"cut.gz cannot be read"):
        load_blocked_domains(str(tmp_path / "cut.gz"))
    (tmp_path / "plain.gz").write_bytes(b"bad.example\n")
    with pytest.raises(BadInput, match=r"plain.gz cannot be read"):
        load_blocked_domains(str(tmp_path / "plain.gz"))
