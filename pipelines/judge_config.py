"""Settings of judging: rules on the pair before any request, and the selection among what is stored."""

from typing import Self

from pydantic import Field, model_validator

from coca.typed_config import Config


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
