"""Settings of images: admission and the stored form."""

from typing import Any

from pydantic import Field, field_validator

from coca.images import ImageLimits, ResizeMode, StoredFormat
from coca.typed_config import Config


class ImageConfig(Config):
    """What is asked of an image, and the form in which it is stored."""

    limits: ImageLimits = ImageLimits(min_side=64, max_aspect_ratio=5.0)
    """Admission: what breaks these is never stored."""
    resize: ResizeMode = "keep_ratio"
    """``no``; ``keep_ratio`` (short side) and ``keep_ratio_largest`` (long side); ``center_crop`` and ``border``, which
    give squares."""
    transform: str | None = None
    """``module:function``, called once in each process; what it returns changes every picture before it is stored, such
    as by blurring faces (``pipelines.image_transform``)."""
    size: int = Field(256, ge=1)
    """The side that ``resize`` speaks of, in pixels."""
    enlarge: bool = False
    """Whether ``keep_ratio`` and ``keep_ratio_largest`` also enlarge, as img2dataset's do unless told otherwise."""
    store_formats: tuple[StoredFormat, ...] = ("jpeg", "png", "webp")
    """Formats stored as they came where nothing else has to change; others are encoded anew."""
    encode_format: StoredFormat = "jpeg"
    """Format of images that are encoded anew."""
    encode_quality: int = Field(92, ge=1, le=100)
    """Quality of jpeg and webp that are encoded anew."""
    decode_timeout_s: float = Field(30.0, gt=0)
    """Seconds one image may take in a decoder's process, which is ended then."""
    decode_memory_mib: int = Field(1280, ge=256)
    """Memory a decoder's process may take, in MiB. Measured: 100 for itself, and for 50 megapixels up to 970 (a WebP
    with transparency), 600 for PNG and 500 for JPEG."""

    @field_validator("resize", mode="before")
    @classmethod
    def _no_is_a_word(cls, value: Any) -> Any:
        return "no" if value is False else value  # YAML reads an unquoted no as false
