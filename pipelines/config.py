"""Settings of a refresh: where links come from, what is asked of a pair, how to fetch, what to store."""

from typing import Self

from pydantic import Field, model_validator

from coca.typed_config import Config
from pipelines.fetch_config import FetchConfig
from pipelines.image_config import ImageConfig
from pipelines.judge_config import JudgeConfig
from pipelines.links_config import LinksConfig
from pipelines.select_config import SelectConfig


class BudgetConfig(Config):
    """How much one refresh may do. What is left over waits for the next one."""

    max_links: int | None = Field(None, ge=1)
    """Most urls asked, checks of stored links included."""
    max_bytes: int | None = Field(None, ge=1)
    """Stop asking once so many body bytes came in; what is in flight is finished."""
    max_minutes: float | None = Field(None, gt=0)
    """Stop asking after so many minutes of fetching, restarts included."""


class RecheckConfig(Config):
    """When links that were asked before are due again."""

    transient_after_s: float = Field(6 * 3600.0, ge=0)
    """After a failure that may pass; doubles with each further one."""
    dead_after_s: float = Field(30 * 86400.0, ge=0)
    """After a 404 or 410; doubles with each further one."""
    max_after_s: float = Field(180 * 86400.0, ge=0)
    """Longest such wait, unless the server itself asked for more."""
    stored_after_s: float = Field(30 * 86400.0, ge=0)
    """A stored link may be asked again, conditionally, when its last answer is older."""
    max_stored: int = Field(0, ge=0)
    """About how many stored urls are asked again in one refresh, those with the oldest answers first; 0 asks none. Each
    shard of the ledger gives its share, rounded up."""


class PublishConfig(Config):
    """How the dataset is laid out."""

    rows_per_row_group: int | None = Field(None, ge=1)
    """Samples per row group, the last of a file excepted: aim at 16-64 MB. Fixed for the life of a dataset; by default
    the dataset's own, and 1,024 for a new one."""
    links_per_part: int = Field(2048, ge=1)
    """Urls per samples file, the unit of work and of resumption (the pairs of one url stay together)."""
    links_per_batch: int = Field(131_072, ge=1)
    """Urls per commit to the tables, and rows that one process holds at once."""
    seed: int = 0
    """Of the shuffle that deals urls to files."""
    lease_s: float = Field(60.0, gt=0)
    """A refresh that was killed on another machine keeps the dataset locked for so long."""

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
    preset: str = "none"
    """The rules of a published dataset, as defaults of judge, image and select (docs/presets.md)."""
    links: LinksConfig = LinksConfig()
    """The table of links."""
    judge: JudgeConfig = JudgeConfig()
    """Rules on the pair, before any request."""
    fetch: FetchConfig = FetchConfig()
    """Fetching."""
    image: ImageConfig = ImageConfig()
    """Image rules and the stored form."""
    select: SelectConfig = SelectConfig()
    """Which stored pairs are part of the version."""
    recheck: RecheckConfig = RecheckConfig()
    """When links are asked again."""
    budget: BudgetConfig = BudgetConfig()
    """How much one refresh may do."""
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
