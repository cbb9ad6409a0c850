"""Settings of fetching."""

from typing import Literal

from pydantic import Field, field_validator

from coca.addresses import parse_networks
from coca.typed_config import Config


class FetchConfig(Config):
    """How bytes are fetched from hosts that may be slow, hostile or gone."""

    engine: Literal["coca", "img2dataset"] = "coca"
    """`coca` is the guarded fetcher that all settings here are about. `img2dataset` is the downloader of that package
    with its exact behaviour: no check of addresses, of sizes or of redirects while fetching, no robots.txt, no limits
    per domain. It needs `pip install 'coca[img2dataset]'`."""
    workers: int | None = Field(None, ge=1)
    """Fetching actors; by default one for each ``1 + decode_processes`` CPUs of the cluster."""
    concurrency_per_worker: int = Field(64, ge=1)
    """Requests in flight per worker."""
    connections_per_domain: int = Field(8, ge=1)
    """Requests in flight to one registered domain, of all workers together."""
    requests_per_second_per_domain: float = Field(50.0, gt=0)
    """Requests started per second to one registered domain, of all workers together, evenly spaced."""
    lease_s: float = Field(10.0, gt=0)
    """How long a worker's share of a domain that several workers fetch from lasts unless it is renewed."""
    max_bytes_in_flight: int = Field(256 * 1024 * 1024, ge=1)
    """Bodies held in memory per worker, in bytes, until they are decoded."""
    decode_processes: int = Field(3, ge=1)
    """Processes per worker that decode and resize while it fetches: a decoder's crash costs its image."""
    dns_threads: int = Field(32, ge=1)
    """Names looked up at once per worker."""
    dns_cache_s: float = Field(300.0, ge=0)
    """How long a worker keeps the addresses of a name."""
    timeout_s: float = Field(10.0, gt=0)
    """Deadline of one attempt from connecting to the last byte, redirects included. Waits for a slot, a lease or
    memory of our own are not part of it."""
    min_bytes_per_second: float = Field(1024.0, ge=0)
    """A body that comes slower than this, on average since its first byte was due, is given up."""
    min_rate_grace_s: float = Field(5.0, ge=0)
    """How much longer a body may take than its minimum rate allows."""
    max_header_bytes: int = Field(32 * 1024, ge=1024)
    """Largest header of an answer, and of the one line in it."""
    retries: int = Field(2, ge=0)
    """Further attempts after a failure that may pass (429, 5xx, no connection, timeout, body cut short)."""
    backoff_s: float = Field(1.0, ge=0)
    """Wait before the first retry; doubles with each, times a random 0.5 to 1.5."""
    max_backoff_s: float = Field(30.0, ge=0)
    """Longest such wait."""
    max_retry_after_s: float = Field(60.0, ge=0)
    """Longest Retry-After that is waited for; a server that asks for more is left for a later refresh."""
    breaker_failures: int = Field(10, ge=1)
    """Failures of a host in a row (no connection, no answer in time) after which it is left alone for a while: its
    links end as `host_unavailable` without a request."""
    breaker_open_s: float = Field(60.0, ge=0)
    """How long it is left alone before one request probes it, and how long a robots.txt that could not be read is
    not asked for again."""
    max_redirects: int = Field(5, ge=0)
    """Redirects followed per attempt; each target is checked like the first address."""
    contact: str = Field("", pattern=r"^[\x20-\x7e]*$")
    """A url or e-mail address for site owners, sent in the user agent."""
    allow_networks: tuple[str, ...] = ()
    """Networks (CIDR) that may be reached beside global addresses, on any port, such as 127.0.0.0/8."""
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none")
    """X-Robots-Tag directives that are taken as an opt-out."""
    tdm_reservation: bool = True
    """Honour the header `tdm-reservation: 1` (W3C TDMRep) as an opt-out."""
    robots_txt: bool = True
    """Honour robots.txt (RFC 9309), asked for once per host and `robots_txt_lifetime_s`."""
    robots_txt_lifetime_s: float = Field(24 * 3600.0, ge=0, le=24 * 3600.0)
    """How long a robots.txt holds; RFC 9309 allows a day."""

    @field_validator("allow_networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parse_networks(value)
        return value
