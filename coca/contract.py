"""The data contract: three tables and a version record. What a dataset is, for everyone who reads or writes one.

samples/ (Delta; wide, immutable, append-only: one row per admitted pair)

| column          | type   | meaning                                                                    |
| --------------- | ------ | -------------------------------------------------------------------------- |
| sample_id       | string | 128-bit BLAKE2b of canonical url and caption, 32 hex digits                |
| url             | string | canonical url                                                              |
| caption         | string | as judged: whitespace collapsed, otherwise untouched                       |
| image           | binary | stored bytes in `format`, never compressed again                           |
| format          | string | jpeg, png or webp                                                          |
| width, height   | int32  | pixels as stored                                                           |
| original_width, original_height | int32 | pixels as fetched, after EXIF orientation                   |
| source_sha256   | string | of the fetched bytes                                                       |
| sha256          | string | of the stored bytes                                                        |
| phash           | int64  | 64-bit perceptual hash (DCT), the bits as a signed integer                 |
| fetched_at      | timestamp[us, UTC] | when the bytes arrived                                         |
| extra           | string? | other columns of the links table, as a JSON object                        |

annotations/ (Delta; narrow: one file for each samples file, same rows, same order)

| column    | type        | meaning                                                                     |
| --------- | ----------- | --------------------------------------------------------------------------- |
| sample_id | string      | the row's key in samples                                                    |
| tokens    | list<int32> | caption tokens, begin and end included, unpadded                            |
| language  | string?     | ISO 639-1 code, null where no identifier ran                                |
| selected  | bool        | part of the version's training data                                         |
| reason    | string?     | a `Reason` where not selected                                               |
| scores    | map<string, float>? | what scorers said, by the scorer's name                             |

links/ (Delta, partitioned by `bucket`; append-only events; a link's state is its latest event)

| column          | type    | meaning                                                                   |
| --------------- | ------- | ------------------------------------------------------------------------- |
| bucket          | string  | first two hex digits of the hash of the canonical url                     |
| sample_id       | string  | the pair's key                                                            |
| url, caption    | string  | canonical url; caption as judged                                          |
| state           | string  | a `State`                                                                 |
| reason          | string? | a `Reason` where the pair is no selected sample                           |
| stored          | bool?   | its bytes lie in samples; null in rows of contract 1: the state is ok     |
| status          | int32?  | last HTTP status                                                          |
| attempts        | int32   | requests made in this refresh                                             |
| etag, last_modified | string? | validators for the next conditional request                           |
| source_sha256   | string? | of the fetched bytes                                                      |
| refresh_id      | string  | which refresh wrote the event                                             |
| event_at        | timestamp[us, UTC] | when                                                           |
| next_check_at   | timestamp[us, UTC]? | when the link is due again, null for never                    |
"""

import hashlib
from enum import StrEnum
from typing import Any
from urllib.parse import quote, unquote_to_bytes, urlsplit, urlunsplit

import pyarrow as pa
from pydantic import BaseModel, ConfigDict

CONTRACT_VERSION = 2

# What this code reads; a refresh widens the tables of an older dataset (columns added, no data file touched).
READABLE_CONTRACTS = (1, 2)

_TIME = pa.timestamp("us", tz="UTC")

SAMPLES = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("format", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("original_width", pa.int32(), nullable=False),
        pa.field("original_height", pa.int32(), nullable=False),
        pa.field("source_sha256", pa.string(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("phash", pa.int64(), nullable=False),
        pa.field("fetched_at", _TIME, nullable=False),
        pa.field("extra", pa.string()),
    ]
)

ANNOTATIONS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("language", pa.string()),
        pa.field("selected", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("scores", pa.map_(pa.string(), pa.float32())),
    ]
)

LINKS = pa.schema(
    [
        pa.field("bucket", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("url", pa.string(), nullable=False),
        pa.field("caption", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("reason", pa.string()),
        pa.field("status", pa.int32()),
        pa.field("attempts", pa.int32(), nullable=False),
        pa.field("etag", pa.string()),
        pa.field("last_modified", pa.string()),
        pa.field("source_sha256", pa.string()),
        pa.field("refresh_id", pa.string(), nullable=False),
        pa.field("event_at", _TIME, nullable=False),
        pa.field("next_check_at", _TIME),
        pa.field("stored", pa.bool_()),
    ]
)

# One row per row group of the samples table, in the order of (file, row group): what a reader plans from.
ROW_GROUPS = pa.schema(
    [
        pa.field("samples_path", pa.string(), nullable=False),
        pa.field("annotations_path", pa.string(), nullable=False),
        pa.field("row_group", pa.int32(), nullable=False),
        pa.field("rows", pa.int32(), nullable=False),
        pa.field("selected", pa.int32(), nullable=False),
    ]
)


class State(StrEnum):
    """Where a link stands after its latest event."""

    OK = "ok"
    DEAD = "dead"  # 404, 410: asked again ever more rarely
    CHANGED = "changed"  # answers with other bytes than those that were admitted, which stay
    TRANSIENT = "transient"  # may pass later: due again at next_check_at
    OPTED_OUT = "opted_out"
    REJECTED = "rejected"  # the pair itself broke a rule
    BLOCKED = "blocked"  # we refuse it: a forbidden address, or an entry of a block list


class Reason(StrEnum):
    """Why a pair did not become a selected sample. Closed: every pair ends in a sample or one of these."""

    # the pair, before any request
    INVALID_URL = "invalid_url"
    EMPTY_CAPTION = "empty_caption"
    CAPTION_TOO_SHORT = "caption_too_short"
    CAPTION_TOO_LONG = "caption_too_long"
    CAPTION_REPEATS = "caption_repeats"  # too many of its words occur in it before
    CAPTION_TOO_FREQUENT = "caption_too_frequent"  # too many links have it
    CAPTION_BLOCKED_WORD = "caption_blocked_word"
    LANGUAGE = "language"
    BLOCKED_URL = "blocked_url"  # its url or domain is on a block list
    DUPLICATE_PAIR = "duplicate_pair"
    WAITING = "waiting"  # left for a later refresh by a budget; never an event of the ledger
    # the fetch
    FORBIDDEN_ADDRESS = "forbidden_address"
    DNS_FAILURE = "dns_failure"
    CONNECT_ERROR = "connect_error"
    TIMEOUT = "timeout"
    TOO_SLOW = "too_slow"  # below the minimum rate
    HOST_UNAVAILABLE = "host_unavailable"  # not asked: too many failures of its host in a row
    NOT_FOUND = "not_found"
    CLIENT_ERROR = "client_error"
    SERVER_ERROR = "server_error"
    RATE_LIMITED = "rate_limited"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    BODY_TOO_LARGE = "body_too_large"
    BODY_TOO_SMALL = "body_too_small"
    BODY_ENCODED = "body_encoded"
    BODY_INCOMPLETE = "body_incomplete"
    OPTED_OUT = "opted_out"  # X-Robots-Tag
    TDM_RESERVED = "tdm_reserved"
    ROBOTS_DISALLOWED = "robots_disallowed"
    # the image
    NOT_AN_IMAGE = "not_an_image"
    TRUNCATED_IMAGE = "truncated_image"
    CORRUPT_IMAGE = "corrupt_image"
    TOO_MANY_PIXELS = "too_many_pixels"
    IMAGE_TOO_SMALL = "image_too_small"
    ASPECT_RATIO = "aspect_ratio"
    DECODER_CRASH = "decoder_crash"
    BLOCKED_IMAGE = "blocked_image"  # its digest is on a block list
    WITHDRAWN = "withdrawn"  # its picture or url has been withdrawn
    # selection: admitted and stored, but not part of the version
    DUPLICATE_IMAGE = "duplicate_image"
    NEAR_DUPLICATE = "near_duplicate"
    CONTAMINATED = "contaminated"  # near a picture of an evaluation set
    SCORE = "score"  # below a threshold of a scorer
    IMAGE_TOO_POPULAR = "image_too_popular"  # too many captions for one picture


class TableVersion(BaseModel):
    """One Delta table as a version of the dataset sees it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    delta_version: int
    files: int
    rows: int


class TokenizerStamp(BaseModel):
    """Which tokenizer wrote the tokens; `path` is relative to the dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    path: str
    vocab_size: int


class VersionRecord(BaseModel):
    """`versions/<n>.json`: what a reader opens. Written last, once: this record is the commit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    parent: int | None
    """Whose rows it went on from; a vacuum may have dropped its record."""
    created_at: str
    contract_version: int
    code_version: str
    kind: str = "refresh"
    """refresh, import, select, retokenize, rollback or compact."""
    refresh_id: str
    samples: TableVersion
    annotations: TableVersion
    links: TableVersion
    selected: int
    rows_per_row_group: int
    row_groups_path: str
    row_groups_sha256: str
    tokenizer: TokenizerStamp
    withdrawn_sha256: str
    funnel: dict[str, Any]
    unapplied_rules: list[str] = []
    """Rules of the preset that need what is not there: a model, a word list."""
    config: dict[str, Any]


def version_path(version: int) -> str:
    return f"versions/{version}.json"


def row_groups_path(version: int) -> str:
    return f"versions/{version}.row_groups.parquet"


def canonical_url(url: str) -> str | None:
    """The form of ``url`` that names the resource: lower-case scheme and host, no default port, no fragment,
    percent-encoding normalised, an empty path as ``/``. Credentials are refused.

    Returns:
        None where the url is not http(s), has no host, or cannot be parsed.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    scheme = parts.scheme.lower()
    if scheme not in ("http", "https") or not host or "@" in parts.netloc:
        return None
    try:
        host = host.encode("idna").decode("ascii") if not host.isascii() else host
    except UnicodeError:
        return None
    if any(character.isspace() or ord(character) < 0x21 for character in host):
        return None
    host = f"[{host}]" if ":" in host else host
    netloc = host if port in (None, {"http": 80, "https": 443}[scheme]) else f"{host}:{port}"
    path = _normal_percent(parts.path) or "/"
    return urlunsplit((scheme, netloc, path, _normal_percent(parts.query), ""))


def _normal_percent(text: str) -> str:
    # Reserved characters keep the form they came in: %2F and / are different resources.
    pieces = text.split("%")
    out = [quote(pieces[0], safe="!$&'()*+,;=:@/?-._~[]")]
    for piece in pieces[1:]:
        code = piece[:2]
        if len(code) == 2 and all(digit in "0123456789abcdefABCDEF" for digit in code):
            byte = unquote_to_bytes("%" + code)
            plain = byte.decode("latin-1")
            keep = plain.isascii() and (plain.isalnum() or plain in "-._~")
            out.append(plain if keep else f"%{code.upper()}")
            out.append(quote(piece[2:], safe="!$&'()*+,;=:@/?-._~[]"))
        else:
            out.append("%25" + quote(piece, safe="!$&'()*+,;=:@/?-._~[]"))
    return "".join(out)


def sample_id(url: str, caption: str) -> str:
    """The pair's key from its *canonical* url and judged caption."""
    return hashlib.blake2b(f"{url}\n{caption}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def link_bucket(url: str) -> str:
    """The ledger partition of a *canonical* url: 256 buckets."""
    return hashlib.blake2b(url.encode("utf-8", "surrogatepass"), digest_size=1).hexdigest()
