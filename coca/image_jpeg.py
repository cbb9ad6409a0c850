"""What is particular to JPEG: decoded straight to an array, decoded scaled, and told when it was cut off."""

import io

import numpy as np
import simplejpeg
from PIL import Image

from coca.image_headers import has_metadata
from coca.image_orientation import DECODER_ERRORS, UPRIGHT, read_orientation

_COLOUR_SPACES = ("YCbCr", "Gray", "RGB")
_GREY = {"L": 128, "RGB": (128, 128, 128)}
# Decodes to something, holds no marker, and lasts for more than one unit of the picture.
_MORE_SCAN_DATA = bytes(range(1, 251)) * 16


def jpeg_pixels(data: bytes, width: int, height: int) -> np.ndarray | None:
    """uint8 (height, width, 3) of an upright, undamaged JPEG of RGB or grey and of this size; None for any other.

    Bit for bit what Pillow gives, which calls the same library and then packs and unpacks each pixel: two thirds of
    the time.
    """
    try:
        if has_metadata(data) and not _is_upright(data):
            return None
        # Asked again: what is allocated goes by the decoder's own reading of a header that may lie.
        read_height, read_width, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        if (read_width, read_height) != (width, height) or colour_space not in _COLOUR_SPACES:
            return None
        pixels_HWC: np.ndarray = simplejpeg.decode_jpeg(data, "RGB", strict=True)  # a warning is an error
    except DECODER_ERRORS:
        return None
    return pixels_HWC


def scaled_size(width: int, height: int, short_side: int) -> tuple[int, int] | None:
    """What to ask Pillow's ``draft`` for, so that the short side stays at least twice ``short_side``.

    It decodes at 1/2, 1/4 or 1/8; None where that would be too small.
    """
    scale = 2 * short_side / min(width, height)
    asked = max(1, round(width * scale)), max(1, round(height * scale))
    return asked if min(width // asked[0], height // asked[1]) >= 2 else None


def lacks_scan_data(image: Image.Image, data: bytes) -> bool:
    """Whether libjpeg ran out of data and filled up with grey, which it takes for a warning that Pillow hides.

    A picture whose last corner is that grey is decoded twice more, at an eighth, as it is and with more data before
    its end marker: one that was complete does not change.
    """
    grey = _GREY.get(image.mode)
    if grey is None or image.getpixel((image.width - 1, image.height - 1)) != grey:
        return False
    end = data.rfind(b"\xff\xd9")
    if end < 0:
        return False
    return _thumbnail(data) != _thumbnail(data[:end] + _MORE_SCAN_DATA + data[end:])


def _is_upright(data: bytes) -> bool:
    with Image.open(io.BytesIO(data), formats=("jpeg",)) as image:
        return read_orientation(image) == UPRIGHT


def _thumbnail(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=("jpeg",)) as image:
        image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
        return image.tobytes()
