"""Settings of the table of links."""

from typing import Literal

from pydantic import Field

from coca.typed_config import Config

PresetName = Literal["", "laion", "datacomp", "coyo", "cc3m", "cc12m"]


class LinksConfig(Config):
    """The table of links."""

    uri: str = ""
    """Parquet, CSV, TSV or JSON lines (text also as .gz): a file, a folder, or a pattern with *, on disk or s3://; or
    one file by https://."""
    columns: PresetName = ""
    """The published tables whose column names are meant: laion, datacomp, coyo, cc3m or cc12m; empty for url and
    caption."""
    url_column: str | None = None
    """Column with the image's url; by default the preset's, or ``url``."""
    caption_column: str | None = None
    """Column with its caption; by default the preset's, or ``caption``."""
    extra_columns: tuple[str, ...] | None = None
    """Other columns carried along as one JSON object, ``*`` for all; by default those of the preset that are there."""
    max_download_bytes: int = Field(16 * 1024**3, gt=0)
    """Largest table that is fetched by https://, in bytes; it is kept on local disk while it is read."""
