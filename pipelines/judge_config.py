"""Settings of judging: rules on url and caption, before any request."""

from typing import Self

from pydantic import Field, model_validator

from coca.typed_config import Config


class JudgeConfig(Config):
    """Rules on the pair itself, before any request. Bounds are inclusive."""

    min_words: int = Field(1, ge=1)
    """Fewest words in a caption, split at whitespace."""
    max_words: int = Field(256, ge=1)
    """Most words in a caption."""
    min_chars: int = Field(3, ge=1)
    """Fewest characters (Unicode code points) in a caption, its whitespace collapsed."""
    max_chars: int = Field(1000, ge=1)
    """Most characters in a caption."""
    max_url_chars: int = Field(2048, ge=1)
    """Longest url, in its canonical form."""
    max_word_repetition: float | None = Field(None, ge=0, le=1)
    """Largest share of a caption's words that occur in it before, upper and lower case alike: 1 - distinct / all."""
    max_caption_count: int | None = Field(None, ge=1)
    """Most links of one snapshot that may have the same caption, letter for letter; all of them go where more do."""
    identify_language: bool = True
    """Identify the language of captions that pass the other rules, 30 to 90 microseconds each. Without, it is null."""
    languages: tuple[str, ...] = ()
    """Languages kept, as ISO 639-1 codes that the identifier knows; empty for all."""
    min_language_confidence: float = Field(0.0, ge=0, le=1)
    """A caption whose likeliest language has a lower probability has none. 0 takes the likeliest whatever it is."""
    blocked_words: str | None = None
    """A list (file or s3 uri) of words and phrases that no caption may hold, whole words in any case."""
    block_domains: str | None = None
    """A list of domains that are never asked, with all their subdomains."""
    block_urls: str | None = None
    """A list of urls that are never asked, compared in canonical form."""
    block_url_parts: tuple[str, ...] = ()
    """Texts that no url may contain, for example '.svg'; upper and lower case count."""
    block_hashes: str | None = None
    """A list of MD5, SHA-1 or SHA-256 digests in hex, mixed at will: fetched bytes that have one are never stored."""

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        if self.min_words > self.max_words or self.min_chars > self.max_chars:
            raise ValueError("a minimum is above its maximum: no caption could pass")
        return self

    @model_validator(mode="after")
    def _languages_are_identified(self) -> Self:
        if self.languages and not self.identify_language:
            raise ValueError("languages are to be kept while identify_language is off: no caption could pass")
        return self

    @model_validator(mode="after")
    def _parts_hold_something(self) -> Self:
        if "" in self.block_url_parts:
            raise ValueError("block_url_parts holds an empty text, which every url contains")
        return self
