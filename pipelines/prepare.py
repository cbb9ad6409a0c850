"""A fetched body to what is stored: digest, safe decode, resize, the stored form and its hashes."""

import hashlib
from dataclasses import dataclass

from PIL import Image

from coca.contract import Reason
from coca.images import (
    Decoded,
    ImageHeader,
    ImageProblem,
    StoredFormat,
    decode,
    encode,
    phash,
    probe,
    resize,
    resized_size,
)
from pipelines.image_config import ImageConfig


@dataclass(frozen=True)
class StoredImage:
    """An admitted image in its stored form."""

    image: bytes
    format: StoredFormat
    width: int
    height: int
    original_width: int
    original_height: int
    sha256: str
    phash: int


@dataclass(frozen=True)
class Prepared:
    """A body's digest, and its image or the reason why it is refused."""

    source_sha256: str
    stored: StoredImage | None = None
    reason: Reason | None = None


def prepare(body: bytes, config: ImageConfig) -> Prepared:
    digest = hashlib.sha256(body).hexdigest()
    try:
        return Prepared(digest, stored=_store(body, config))
    except ImageProblem as problem:
        return Prepared(digest, reason=problem.reason)


def _store(body: bytes, config: ImageConfig) -> StoredImage:
    header = probe(body, config.limits)
    decoded = decode(body, config.limits, short_side=_stored_short_side(header, config), header=header)
    original = (decoded.original_width, decoded.original_height)
    image = resize(decoded.image, config.resize, config.size, enlarge=config.enlarge, original=original)
    if config.transform is not None:
        image = _transform(image, config.transform)
    unchanged = image.size == original and config.transform is None
    kept = _storable_as_is(decoded, config) if unchanged else None
    stored = body if kept else encode(image, config.encode_format, config.encode_quality)
    return StoredImage(
        image=stored,
        format=kept or config.encode_format,
        width=image.width,
        height=image.height,
        original_width=decoded.original_width,
        original_height=decoded.original_height,
        sha256=hashlib.sha256(stored).hexdigest(),
        phash=phash(image),
    )


def _transform(image: Image.Image, factory: str) -> Image.Image:
    from pipelines.image_transform import transform_image  # not needed by most, and each process pays for it

    return transform_image(factory, image)


def _storable_as_is(decoded: Decoded, config: ImageConfig) -> StoredFormat | None:
    """The source's format where its bytes can be stored untouched: every decoder then reads the same pixels."""
    if not decoded.plain or decoded.format == "gif" or decoded.format not in config.store_formats:
        return None
    return decoded.format


def _stored_short_side(header: ImageHeader, config: ImageConfig) -> int | None:
    """The short side that will be stored: a JPEG need not be decoded much larger."""
    if config.resize == "no":
        return None
    if config.resize == "border":
        scale = config.size / max(header.width, header.height)
        return max(1, round(min(header.width, header.height) * scale))
    return min(resized_size(header.width, header.height, config.resize, config.size, enlarge=config.enlarge))
