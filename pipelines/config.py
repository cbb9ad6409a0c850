"""Settings of a refresh: where links come from, what is asked of a pair, how to fetch, what to store."""

from typing import Self

from pydantic import Field, model_validator

from coca.typed_config import Config
from pipelines.fetch_config import FetchConfig
from pipelines.image_config import ImageConfig
from pipelines.judge_config import JudgeConfig
from pipelines.links_config import LinksConfig


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
