"""Untrusted bytes to pixels: header probe with caps, safe decode, resize, encode, perceptual hash.

Pipelines, evaluation and serving all decode through here. The size is read from the header by code of our own
and checked against the caps before Pillow sees a byte; Pillow is then told the one format it may try.
"""

import io
import struct
import warnings
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import Field

from coca.contract import Reason
from coca.image_headers import Format, has_more_scans, read_size, sniff_format
from coca.image_jpeg import jpeg_pixels, lacks_scan_data, scaled_size
from coca.image_orientation import DECODER_ERRORS, SIDEWAYS, UPRIGHT, read_orientation, turn_upright
from coca.image_resize import ResizeMode, center_crop, resize, resized_size
from coca.typed_config import Config

__all__ = [
    "Decoded",
    "ImageHeader",
    "ImageLimits",
    "ImageProblem",
    "ResizeMode",
    "StoredFormat",
    "decode",
    "decode_pixels",
    "decode_rgb",
    "encode",
    "model_pixels",
    "phash",
    "probe",
    "resize",
    "resized_size",
]

StoredFormat = Literal["jpeg", "png", "webp"]

# Progressive files have about ten; each costs a pass over the whole picture, however few bytes it takes.
_MAX_SCANS = 64

# Pillow warns of damaged metadata; strangers' images are full of it, and the pixels decide.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
# Sizes are held against limits of our own.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageLimits(Config):
    """What an image must keep to before any of it is decoded."""

    max_bytes: int = Field(20 * 1024 * 1024, gt=0)
    """Largest encoded image, in bytes."""
    min_bytes: int = Field(0, ge=0)
    """Smallest encoded image, in bytes; LAION and COYO took 5 KB."""
    max_pixels: int = Field(50_000_000, gt=0, le=89_478_485)
    """Largest width times height; Pillow itself warns above 89,478,485."""
    min_side: int = Field(1, ge=1)
    """Smallest width and height, in pixels."""
    max_aspect_ratio: float = Field(50.0, ge=1)
    """Largest ratio of the long side to the short side."""
    formats: tuple[Format, ...] = ("jpeg", "png", "webp", "gif")
    """Formats accepted, told by content and never by label."""


class ImageProblem(ValueError):
    """Bytes that are refused: ``reason`` from the closed list, ``detail`` for a person."""

    def __init__(self, reason: Reason, detail: str) -> None:
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason.value}: {detail}")

    def __reduce__(self) -> tuple[type["ImageProblem"], tuple[Reason, str]]:
        return type(self), (self.reason, self.detail)


@dataclass(frozen=True)
class ImageHeader:
    """Format and size in pixels as the header gives them, before EXIF orientation."""

    format: Format
    width: int
    height: int


def probe(data: bytes, limits: ImageLimits) -> ImageHeader:
    """Read the header and hold it against the limits; nothing is decoded.

    Raises:
        ImageProblem: not one of the formats, a damaged header, or a limit broken.
    """
    if len(data) > limits.max_bytes:
        raise ImageProblem(Reason.BODY_TOO_LARGE, f"{len(data):,} bytes, at most {limits.max_bytes:,}")
    if len(data) < limits.min_bytes:
        raise ImageProblem(Reason.BODY_TOO_SMALL, f"{len(data):,} bytes, at least {limits.min_bytes:,}")
    kind = sniff_format(data)
    if kind is None:
        raise ImageProblem(Reason.NOT_AN_IMAGE, "the bytes are no JPEG, PNG, WebP or GIF")
    if kind not in limits.formats:
        raise ImageProblem(Reason.NOT_AN_IMAGE, f"{kind} is not accepted, only {', '.join(limits.formats)}")
    try:
        width, height = read_size(kind, data)
    except EOFError as error:
        raise ImageProblem(Reason.TRUNCATED_IMAGE, str(error)) from None
    except ValueError as error:
        raise ImageProblem(Reason.CORRUPT_IMAGE, str(error)) from None
    _check_size(width, height, limits)
    if kind == "jpeg" and has_more_scans(data, _MAX_SCANS):
        raise ImageProblem(Reason.CORRUPT_IMAGE, f"jpeg: more than {_MAX_SCANS} scans")
    return ImageHeader(kind, width, height)


@dataclass(frozen=True)
class Decoded:
    """An image decoded to RGB, and what its source was."""

    image: Image.Image
    format: Format
    original_width: int
    """Pixels of the source after EXIF orientation; more than the image's where it was decoded scaled."""
    original_height: int
    plain: bool
    """The source is one upright frame of opaque 8-bit RGB or grey: what every decoder reads alike."""


def decode(
    data: bytes, limits: ImageLimits, *, short_side: int | None = None, header: ImageHeader | None = None
) -> Decoded:
    """The first frame in mode RGB: EXIF orientation applied, transparency over white.

    Args:
        short_side: where given, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as long as its short
            side stays at least twice this (Pillow's gap for scaled decoding): the work falls with the pixels.
        header: what :func:`probe` said of these bytes and limits, where it has been asked already.

    Raises:
        ImageProblem: a limit broken, or bytes that do not decode.
    """
    header = header or probe(data, limits)
    try:
        with Image.open(io.BytesIO(data), formats=(header.format,)) as image:
            _check_size(*image.size, limits)  # a GIF frame may exceed the size its header gives
            width, height = image.size
            if header.format == "jpeg" and short_side is not None:
                image.draft(None, scaled_size(width, height, short_side))
            image.load()
            if header.format == "jpeg" and lacks_scan_data(image, data):
                raise ImageProblem(Reason.TRUNCATED_IMAGE, "jpeg: the data ends before the picture does")
            # Only now: Pillow loads a PNG to find its EXIF, and a failure there is not one of metadata.
            orientation = read_orientation(image)
            plain = orientation == UPRIGHT and _is_plain(image)
            upright = turn_upright(_to_rgb(image), orientation)
    except ImageProblem:
        raise
    except Image.DecompressionBombError as error:
        raise ImageProblem(Reason.TOO_MANY_PIXELS, f"{header.format}: {error}") from None
    except DECODER_ERRORS as error:
        detail = f"{header.format}: {_told(error)}"
        if "truncated" in str(error).lower() or _ends_early(header.format, data):
            raise ImageProblem(Reason.TRUNCATED_IMAGE, detail) from None
        raise ImageProblem(Reason.CORRUPT_IMAGE, detail) from None
    if orientation in SIDEWAYS:
        width, height = height, width
    return Decoded(upright, header.format, width, height, plain)


def decode_rgb(data: bytes, limits: ImageLimits) -> Image.Image:
    """The image of :func:`decode` at its full size."""
    header = probe(data, limits)
    pixels_HWC = _straight(data, header)
    return decode(data, limits, header=header).image if pixels_HWC is None else Image.fromarray(pixels_HWC)


def decode_pixels(data: bytes, limits: ImageLimits, *, short_side: int | None = None) -> np.ndarray:
    """The image of :func:`decode` as uint8 (height, width, 3); of most JPEGs in two thirds of the time.

    Raises:
        ImageProblem: as `decode` does.
    """
    header = probe(data, limits)
    pixels_HWC = _straight(data, header, short_side)
    if pixels_HWC is None:
        return np.asarray(decode(data, limits, short_side=short_side, header=header).image)
    return pixels_HWC


def _straight(data: bytes, header: ImageHeader, short_side: int | None = None) -> np.ndarray | None:
    """The pixels of a JPEG that Pillow is not needed for, None of anything else."""
    if header.format != "jpeg" or (short_side and scaled_size(header.width, header.height, short_side)):
        return None
    return jpeg_pixels(data, header.width, header.height)


def encode(image: Image.Image, format: StoredFormat, quality: int) -> bytes:  # noqa: A002
    """Encoded bytes without metadata; ``quality`` (1-100) has no meaning for png."""
    buffer = io.BytesIO()
    options = {} if format == "png" else {"quality": quality}
    image.save(buffer, format, **options)
    return buffer.getvalue()


def phash(image: Image.Image) -> int:
    """64-bit perceptual hash: the 8 x 8 lowest DCT frequencies of the 32 x 32 grey image over their median.

    Near pictures differ in few bits. Returned as a signed integer, for the int64 column.
    """
    # Lanczos, after whole blocks have been averaged down to twice the size: a fifth of the time.
    small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=2.0)
    grey = np.asarray(small, dtype=np.float64)
    basis = _dct_basis()
    low = (basis @ grey @ basis.T).ravel()
    bits = np.packbits(low > np.median(low[1:]))
    return int.from_bytes(bits.tobytes(), "big", signed=True)


def model_pixels(image: Image.Image, size: int) -> np.ndarray:
    """What the model sees, in training, evaluation and serving alike: short side to ``size``, centre crop.

    Returns:
        uint8 array of shape (size, size, 3).
    """
    return np.array(center_crop(image.convert("RGB"), size))


@cache
def _dct_basis() -> np.ndarray:
    """The first 8 rows of the 32-point DCT-II."""
    frequency, place = np.arange(8)[:, None], np.arange(32)[None, :]
    return np.cos(np.pi * frequency * (2 * place + 1) / 64)


def _check_size(width: int, height: int, limits: ImageLimits) -> None:
    size = f"{width} x {height} pixels"
    short, long = min(width, height), max(width, height)
    if short < 1:
        raise ImageProblem(Reason.CORRUPT_IMAGE, f"the header says {size}")
    if width * height > limits.max_pixels:
        raise ImageProblem(Reason.TOO_MANY_PIXELS, f"{size}, at most {limits.max_pixels:,} in all")
    if short < limits.min_side:
        raise ImageProblem(Reason.IMAGE_TOO_SMALL, f"{size}, sides of at least {limits.min_side}")
    if long > limits.max_aspect_ratio * short:
        raise ImageProblem(Reason.ASPECT_RATIO, f"{size}, ratio above {limits.max_aspect_ratio:g}")


def _ends_early(kind: Format, data: bytes) -> bool:
    """Whether a file that failed to decode lacks its end."""
    if kind == "png":
        return b"IEND" not in data[-64:]
    if kind == "gif":
        return not data.rstrip(b"\0").endswith(b";")
    if kind == "webp":
        return struct.unpack_from("<I", data, 4)[0] + 8 > len(data)
    return not data.rstrip(b"\0").endswith(b"\xff\xd9")


def _told(error: Exception) -> str:
    # Pillow's message for this one holds a memory address.
    return "not recognised by the decoder" if isinstance(error, UnidentifiedImageError) else str(error)


def _is_plain(image: Image.Image) -> bool:
    if image.mode not in ("RGB", "L") or image.has_transparency_data:
        return False
    return not getattr(image, "is_animated", False)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        image = _to_8_bit(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB")
    layered = image.convert("RGBA")
    over_white = Image.new("RGB", layered.size, "white")
    over_white.paste(layered, mask=layered)
    return over_white


def _to_8_bit(image: Image.Image) -> Image.Image:
    # Pillow's own conversion saturates: 40000 of 65535 would come out white.
    values = np.asarray(image)
    if values.dtype != np.uint16:
        values = values.clip(0, 65535).astype(np.uint16)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
