"""Settings of the table of links."""

from coca.typed_config import Config


class LinksConfig(Config):
    """The table of links."""

    uri: str = ""
    """Parquet or CSV: a file, a folder, or a pattern with *, on disk or s3://."""
    url_column: str = "url"
    """Column with the image's url."""
    caption_column: str = "caption"
    """Column with its caption."""
