"""Which way up a picture is, by its EXIF or XMP metadata."""

import struct
import zlib

from PIL import Image

# What Pillow's decoders for our formats raise on damaged input (seen by fuzzing; tests/coca/test_image_fuzz.py).
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
)
UPRIGHT = 1
SIDEWAYS = (5, 6, 7, 8)

_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_orientation(image: Image.Image) -> int:
    """The EXIF value, 1 to 8, of an opened picture; broken metadata is no reason to refuse a sound one."""
    try:
        value = image.getexif().get(_TAG, UPRIGHT)
    except DECODER_ERRORS:
        return UPRIGHT
    return value if value in _TURNS else UPRIGHT


def turn_upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image
