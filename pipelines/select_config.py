"""Settings of selection: which stored pairs are part of a version."""

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from coca.typed_config import Config


class SelectConfig(Config):
    """Which stored pairs are part of a version. Rules left at null ask nothing beyond admission."""

    duplicates: Literal["none", "exact", "perceptual"] = "exact"
    """Of the same picture under several urls one url is selected: equal bytes, or also near perceptual hashes."""
    max_hamming: int = Field(4, ge=0, le=12)
    """Bits of 64 in which the hashes of near pictures may differ. Nearly all have 32 set: distances are even."""
    pair_duplicates_by_phash: bool = False
    """Of pairs with equal perceptual hash and equal caption one is selected (COYO-700M)."""
    max_captions_per_image: int | None = Field(None, ge=1)
    """Pictures stored with more pairs than this are not selected at all (ALIGN: 1,000)."""
    languages: tuple[str, ...] | None = None
    """ISO 639-1 codes; a caption without a known language is not selected."""
    min_words: int | None = Field(None, ge=1)
    """Fewest words in a caption, split at whitespace."""
    max_words: int | None = Field(None, ge=1)
    """Most words in a caption."""
    min_chars: int | None = Field(None, ge=1)
    """Fewest characters in a caption."""
    max_chars: int | None = Field(None, ge=1)
    """Most characters in a caption."""
    max_caption_count: int | None = Field(None, ge=1)
    """Captions that more stored pairs than this have are not selected."""
    min_side: int | None = Field(None, ge=1)
    """Smallest width and height of the picture as fetched, in pixels."""
    max_aspect_ratio: float | None = Field(None, ge=1)
    """Largest ratio of the long side to the short side of the picture as fetched."""
    min_scores: dict[str, float] = Field({})
    """Lowest score by the scorer's name; a pair without that score is not selected. A name with null is taken away."""
    contaminants: tuple[str, ...] = ()
    """Hash lists of evaluation pictures (path or s3://), a hash a line: 64 hex digits, the SHA-256 of the file, or 16,
    its perceptual hash."""
    max_hamming_contaminants: int = Field(4, ge=0, le=12)
    """Bits in which a perceptual hash may differ from one of ``contaminants``."""

    @field_validator("min_scores", mode="before")
    @classmethod
    def _without_null(cls, value: Any) -> Any:
        # Settings are laid over the standing ones key by key, and a key cannot be laid over with nothing.
        return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for low, high in ((self.min_words, self.max_words), (self.min_chars, self.max_chars)):
            if low is not None and high is not None and low > high:
                raise ValueError("a minimum is above its maximum: no caption could pass")
        return self

    @property
    def needs_captions(self) -> bool:
        limits = (self.min_words, self.max_words, self.min_chars, self.max_chars, self.max_caption_count)
        return self.pair_duplicates_by_phash or any(limit is not None for limit in limits)

    @property
    def needs_sizes(self) -> bool:
        return self.min_side is not None or self.max_aspect_ratio is not None


class SelectionConfig(Config):
    """What ``coca data select`` is given."""

    select: SelectConfig = SelectConfig()
    """Which stored pairs are part of the version."""
