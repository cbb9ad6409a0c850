"""Settings of images: admission and the stored form."""

from pydantic import Field

from coca.images import ImageLimits, ResizeMode, StoredFormat
from coca.typed_config import Config


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
