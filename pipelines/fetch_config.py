"""Settings of fetching."""

from pydantic import Field, field_validator

from coca.addresses import parse_networks
from coca.typed_config import Config


class FetchConfig(Config):
    """How bytes are fetched from hosts that may be slow, hostile or gone."""

    workers: int | None = Field(None, ge=1)
    """Fetching actors; by default half of the cluster's CPUs. One CPU at least stays free for writing."""
    concurrency_per_worker: int = Field(64, ge=1)
    """Requests in flight per worker."""
    concurrency_per_host: int = Field(8, ge=1)
    """Requests in flight per worker to one host."""
    max_bytes_in_flight: int = Field(256 * 1024 * 1024, ge=1)
    """Bodies held in memory per worker, in bytes, until they are decoded."""
    decode_threads: int = Field(2, ge=1)
    """Threads per worker that decode and resize while others are fetched."""
    timeout_s: float = Field(20.0, gt=0)
    """Deadline of one attempt from connecting to the last byte, redirects included."""
    retries: int = Field(2, ge=0)
    """Further attempts after a failure that may pass (429, 5xx, no connection, timeout, body cut short)."""
    backoff_s: float = Field(1.0, ge=0)
    """Wait before the first retry; doubles with each, times a random 0.5 to 1.5."""
    max_backoff_s: float = Field(30.0, ge=0)
    """Longest such wait."""
    max_retry_after_s: float = Field(60.0, ge=0)
    """Longest Retry-After that is waited for; a server that asks for more is left for a later refresh."""
    max_redirects: int = Field(5, ge=0)
    """Redirects followed per attempt; each target is checked like the first address."""
    recheck_after_s: float = Field(6 * 3600.0, ge=0)
    """When a link that failed for a passing cause is due again."""
    contact: str = Field("", pattern=r"^[\x20-\x7e]*$")
    """A url or e-mail address for site owners, sent in the user agent."""
    allow_networks: tuple[str, ...] = ()
    """Networks (CIDR) that may be reached beside global addresses, on any port, such as 127.0.0.0/8."""
    opt_out_directives: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex", "none")
    """X-Robots-Tag directives that are taken as an opt-out."""

    @field_validator("allow_networks")
    @classmethod
    def _networks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        parse_networks(value)
        return value
