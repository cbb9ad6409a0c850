"""Format and size of an image from its first bytes: JPEG, PNG, WebP and GIF, without a decoder.

Pillow builds the decoder while it opens a file (a WebP's canvas is allocated there), so a cap on pixels that
asks Pillow for the size asks too late.
"""

import re
import struct
from collections.abc import Iterator
from itertools import takewhile
from typing import Literal

Format = Literal["jpeg", "png", "webp", "gif"]

_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_APP1 = 0xE1
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL_FRAMES = (0xC0, 0xC1)
# Inside a scan 0xFF is followed by 0, or by a restart marker.
_MARKER_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


def sniff_format(data: bytes) -> Format | None:
    """The format by its signature, None where it is none of ours."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    return None


def read_size(kind: Format, data: bytes) -> tuple[int, int]:
    """(width, height) in pixels as the header gives them, before EXIF orientation.

    Raises:
        EOFError: the header ends early.
        ValueError: the header is malformed.
    """
    try:
        return _READERS[kind](data)
    except (struct.error, IndexError):
        raise EOFError(f"the {kind} header ends early") from None


def has_more_scans(data: bytes, most: int) -> bool:
    """Whether a JPEG has more scans than ``most``; each costs a decoder a pass over the whole picture."""
    try:
        if _is_one_scan(data) or data.count(b"\xff\xda") <= most:  # the count takes in metadata and what follows
            return False
        scans = 0
        for marker, _ in _jpeg_segments(data):
            scans += marker == _START_OF_SCAN
            if scans > most:
                return True
    except (struct.error, IndexError, ValueError):
        pass  # what follows a scan may be cut off or damaged: for the decoder to judge
    return False


def has_metadata(data: bytes) -> bool:
    """Whether a JPEG has a segment of the kind that holds EXIF or XMP, where decoders look for it.

    Raises:
        struct.error, IndexError, ValueError: the header is malformed.
    """
    before_scan = takewhile(lambda marker: marker != _START_OF_SCAN, (marker for marker, _ in _jpeg_segments(data)))
    return _APP1 in before_scan


def _is_one_scan(data: bytes) -> bool:
    """Whether the first scan is all that a decoder will read: sequential, with every component."""
    frame = components = 0
    for marker, place in _jpeg_segments(data):
        if marker in _FRAMES:
            frame, components = marker, data[place + 9]
        if marker == _START_OF_SCAN:
            return frame in _SEQUENTIAL_FRAMES and data[place + 4] == components
    return False


def _jpeg_size(data: bytes) -> tuple[int, int]:
    for marker, place in _jpeg_segments(data):
        if marker in (_START_OF_SCAN, _END_OF_IMAGE):
            break
        if marker in _FRAMES:
            height, width = struct.unpack_from(">HH", data, place + 5)
            return width, height
    raise ValueError("jpeg: no frame header before the data")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """(marker, place of its 0xFF) of each segment, the end marker the last."""
    place = 2
    while True:
        while data[place] == 0xFF and data[place + 1] == 0xFF:  # fill bytes
            place += 1
        if data[place] != 0xFF:
            raise ValueError("jpeg: no marker where a segment should start")
        marker = data[place + 1]
        yield marker, place
        if marker == _END_OF_IMAGE:
            return
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            place += 2
            continue
        place += 2 + max(2, int(struct.unpack_from(">H", data, place + 2)[0]))
        if marker == _START_OF_SCAN:
            found = _MARKER_AFTER_SCAN.search(data, place)
            if found is None:
                return
            place = found.start()


def _png_size(data: bytes) -> tuple[int, int]:
    kind, width, height = struct.unpack_from(">4sII", data, 12)
    if kind != b"IHDR":
        raise ValueError("png: the first chunk is not IHDR")
    return width, height


def _gif_size(data: bytes) -> tuple[int, int]:
    width, height = struct.unpack_from("<HH", data, 6)
    return width, height


def _webp_size(data: bytes) -> tuple[int, int]:
    (kind,) = struct.unpack_from("4s", data, 12)
    if kind == b"VP8X":
        low_w, high_w, low_h, high_h = struct.unpack_from("<HBHB", data, 24)
        return (high_w << 16 | low_w) + 1, (high_h << 16 | low_h) + 1
    if kind == b"VP8L":
        (packed,) = struct.unpack_from("<I", data, 21)
        return (packed & 0x3FFF) + 1, (packed >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return width & 0x3FFF, height & 0x3FFF
    raise ValueError(f"webp: the first chunk is {kind!r}")


_READERS = {"jpeg": _jpeg_size, "png": _png_size, "gif": _gif_size, "webp": _webp_size}
