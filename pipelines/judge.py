"""Judging pairs before any request: what the url and the caption alone decide."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coca.contract import Reason, sample_id
from pipelines.block_lists import BlockedDomains, BlockedUrls, load_blocked_domains, load_blocked_urls
from pipelines.canonical_urls import canonical_urls
from pipelines.judge_config import JudgeConfig
from pipelines.language import check_languages, identify
from pipelines.text_rules import BlockedWords, judge_captions, load_blocked_words

JUDGED = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("language", pa.string()),
        pa.field("extra", pa.string()),
        pa.field("reason", pa.string()),
    ]
)


@dataclass(frozen=True)
class Rules:
    """The settings with their lists loaded. Pickles; put it into Ray's object store once, the lists may be large."""

    config: JudgeConfig
    words: BlockedWords | None = None
    domains: BlockedDomains | None = None
    urls: BlockedUrls | None = None


def load_rules(config: JudgeConfig) -> Rules:
    """The rules, their word and block lists read from disk or S3 (``block_hashes`` excepted: it is for fetched bytes,
    see :func:`pipelines.block_lists.load_blocked_hashes`).

    Raises:
        BadInput: a list that cannot be read or has a wrong line, or a language the identifier does not know.
    """
    if config.languages:
        check_languages(config.languages)
    return Rules(
        config,
        words=load_blocked_words(config.blocked_words) if config.blocked_words else None,
        domains=load_blocked_domains(config.block_domains) if config.block_domains else None,
        urls=load_blocked_urls(config.block_urls) if config.block_urls else None,
    )


def judge_pairs(links: pa.Table, rules: Rules) -> pa.Table:
    """Every row of a links table (``url``, ``caption`` and, where there is one, ``extra``) with its key and verdict.

    Returns:
        ``JUDGED``, in the order of ``links``: canonical url (as it came where there is none), caption with its
        whitespace collapsed, language of captions that keep the other rules, and the first ``Reason`` against the
        pair: its url, then its caption, then its language. Equal pairs are not told apart here.
    """
    raw_urls = _texts(links["url"])
    captions = [" ".join(caption.split()) if caption else "" for caption in _texts(links["caption"])]
    longest = rules.config.max_url_chars
    canonical = [url if url is not None and len(url) <= longest else None for url in canonical_urls(raw_urls)]
    urls = [(raw or "").strip() if url is None else url for url, raw in zip(canonical, raw_urls, strict=True)]
    reasons = pc.coalesce(_judge_urls(canonical, rules), judge_captions(captions, rules.config, rules.words))
    languages, reasons = _judge_languages(captions, reasons, rules.config)
    columns = [
        pa.array(map(sample_id, urls, captions), pa.string(), size=len(urls)),
        pa.array(urls, pa.string()),
        pa.array(captions, pa.string()),
        languages,
        pa.array(_texts(links["extra"]), pa.string()) if "extra" in links.column_names else pa.nulls(len(urls)),
        reasons,
    ]
    return pa.table(dict(zip(JUDGED.names, columns, strict=True)), schema=JUDGED)


def caption_hashes(captions: pa.ChunkedArray) -> np.ndarray:
    """64-bit BLAKE2b of captions as they are judged (whitespace collapsed, case kept), for counting equal ones.

    The published rules speak of equal texts, so case counts.

    Returns:
        (N,) uint64, the same on every machine and in every run.
    """
    texts = captions.to_pylist()
    hashes = b"".join(
        hashlib.blake2b((text or "").encode("utf-8", "surrogatepass"), digest_size=8).digest() for text in texts
    )
    return np.frombuffer(hashes, dtype="<u8")


def _judge_urls(urls: Sequence[str | None], rules: Rules) -> pa.Array:
    """The reason against each canonical url: (N,) string, null where there is none."""
    known = [url or "" for url in urls]
    column = pa.array(known, pa.string())
    blocked = np.zeros(len(urls), dtype=bool)
    for part in rules.config.block_url_parts:
        blocked |= pc.match_substring(column, part).to_numpy(zero_copy_only=False)
    if rules.urls is not None:
        blocked |= rules.urls.matches(known)
    if rules.domains is not None:
        blocked |= _match_domains(known, rules.domains)
    invalid = pc.equal(column, "")
    return pc.case_when(
        pc.make_struct(invalid, pa.array(blocked)), pa.scalar(Reason.INVALID_URL), pa.scalar(Reason.BLOCKED_URL)
    )


def _match_domains(urls: Sequence[str], domains: BlockedDomains) -> np.ndarray:
    hosts = pa.array(map(_host, urls), pa.string(), size=len(urls)).dictionary_encode()
    return domains.matches(hosts.dictionary.to_pylist())[hosts.indices.to_numpy()]


def _host(url: str) -> str:
    """The host of a canonical url, an IPv6 address in its brackets."""
    if not url:
        return ""
    place = url.split("/", 3)[2]
    return place[: place.index("]") + 1] if place.startswith("[") else place.partition(":")[0]


def _judge_languages(captions: Sequence[str], reasons: pa.Array, config: JudgeConfig) -> tuple[pa.Array, pa.Array]:
    """Languages of the captions that passed so far, and the reasons with those of refused languages."""
    if not config.identify_language:
        return pa.nulls(len(captions), pa.string()), reasons
    passed = reasons.is_null().to_numpy(zero_copy_only=False)
    found = identify(compress(captions, passed), config.min_language_confidence)
    mask = pa.array(passed)
    languages = pc.replace_with_mask(pa.nulls(len(captions), pa.string()), mask, pa.array(found, pa.string()))
    if not config.languages:
        return languages, reasons
    refused = [None if language in config.languages else Reason.LANGUAGE.value for language in found]
    return languages, pc.replace_with_mask(reasons, mask, pa.array(refused, pa.string()))


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    """Python strings; bytes that are no UTF-8, which a Parquet file may hold in a text column, become U+FFFD."""
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        raw = column.cast(pa.binary()).to_pylist()
        return [None if text is None else text.decode("utf-8", "replace") for text in raw]
