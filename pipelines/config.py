"""Settings of a refresh: where links come from, what is asked of a pair, how to fetch, what to store."""

from typing import Self

from pydantic import Field, field_validator, model_validator

from coca.addresses import parse_networks
from coca.images import ImageLimits, ResizeMode, StoredFormat
from coca.typed_config import Config


class LinksConfig(Config):
    """The table of links."""

    uri: str = ""
    """Parquet or CSV: a file, a folder, or a pattern with *, on disk or s3://."""
    url_column: str = "url"
    """Column with the image's url."""
    caption_column: str = "caption"
    """Column with its caption."""


class JudgeConfig(Config):
    """Rules on the pair itself, before any request."""

    min_words: int = Field(1, ge=1)
    """Fewest words in a caption, split at whitespace."""
    max_words: int = Field(256, ge=1)
    """Most words in a caption."""
    min_chars: int = Field(3, ge=1)
    """Fewest characters in a caption."""
    max_chars: int = Field(1000, ge=1)
    """Most characters in a caption."""
    max_url_chars: int = Field(2048, ge=1)
    """Longest url."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.min_words > self.max_words or self.min_chars > self.max_chars:
            raise ValueError("a minimum is above its maximum: no caption could pass")
        return self


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


class ImageConfig(Config):
    """What is asked of an image, and the form in which it is stored."""

    limits: ImageLimits = ImageLimits(min_side=64, max_aspect_ratio=5.0)
    """Admission: what breaks these is never stored."""
    resize: ResizeMode = "keep_ratio"
    """``no``; ``keep_ratio`` (short side) and ``keep_ratio_largest`` (long side), which never enlarge; ``center_crop``
    and ``border``, which give squares."""
    size: int = Field(256, ge=1)
    """The side that ``resize`` speaks of, in pixels."""
    store_formats: tuple[StoredFormat, ...] = ("jpeg", "png", "webp")
    """Formats stored as they came where nothing else has to change; others are encoded anew."""
    encode_format: StoredFormat = "jpeg"
    """Format of images that are encoded anew."""
    encode_quality: int = Field(92, ge=1, le=100)
    """Quality of jpeg and webp that are encoded anew."""


class PublishConfig(Config):
    """How the dataset is laid out."""

    rows_per_row_group: int | None = Field(None, ge=1)
    """Samples per row group, the last of a file excepted: aim at 16-64 MB. Fixed for the life of a dataset; by default
    the dataset's own, and 1,024 for a new one."""
    links_per_part: int = Field(4096, ge=1)
    """Links per samples file, the unit of work and of resumption (the pairs of one url stay together)."""
    links_per_batch: int = Field(131_072, ge=1)
    """Links per commit to the tables."""

    @property
    def row_group_rows(self) -> int:
        """``rows_per_row_group`` of a config that a refresh has settled."""
        assert self.rows_per_row_group is not None
        return self.rows_per_row_group


class RefreshConfig(Config):
    """One refresh of a dataset from a table of links."""

    to: str = ""
    """The dataset: a folder or s3://BUCKET/PREFIX."""
    tokenizer: str | None = None
    """Tokenizer file; by default the dataset's own."""
    links: LinksConfig = LinksConfig()
    """The table of links."""
    judge: JudgeConfig = JudgeConfig()
    """Rules on the pair, before any request."""
    fetch: FetchConfig = FetchConfig()
    """Fetching."""
    image: ImageConfig = ImageConfig()
    """Image rules and the stored form."""
    publish: PublishConfig = PublishConfig()
    """Layout of the dataset."""

    @model_validator(mode="after")
    def _body_fits(self) -> Self:
        if self.image.limits.max_bytes > self.fetch.max_bytes_in_flight:
            raise ValueError(
                f"image.limits.max_bytes = {self.image.limits.max_bytes} is above "
                f"fetch.max_bytes_in_flight = {self.fetch.max_bytes_in_flight}: a largest body would never fit"
            )
        return self
