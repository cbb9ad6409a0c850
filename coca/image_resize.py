"""Sizes and pixels after resizing: the modes of img2dataset, and the crop that the model sees."""

from typing import Literal

from PIL import Image

ResizeMode = Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"]

# Pillow first averages whole blocks of pixels down to this many times the wanted size, then takes the bicubic
# filter; a third of the time, no further from a Lanczos reference than OpenCV's INTER_AREA (docs/decisions/0021).
_REDUCING_GAP = 1.25


def resized_size(width: int, height: int, mode: ResizeMode, size: int, *, enlarge: bool = False) -> tuple[int, int]:
    """(width, height) after :func:`resize`, rounded as img2dataset rounds."""
    if mode == "no":
        return width, height
    if mode in ("center_crop", "border"):
        return size, size
    side = min(width, height) if mode == "keep_ratio" else max(width, height)
    if side <= size and not enlarge:
        return width, height
    return _scaled(width, height, size / side)


def resize(image: Image.Image, mode: ResizeMode, size: int, *, enlarge: bool = False) -> Image.Image:
    """Resize with bicubic antialiasing.

    Args:
        mode: ``no``; ``keep_ratio`` (short side becomes ``size``) and ``keep_ratio_largest`` (long side);
            ``center_crop`` and ``border`` (white), which give ``size`` x ``size``.
        size: pixels.
        enlarge: whether the two modes that keep the ratio also enlarge; the two that give squares always do.
    """
    if mode == "center_crop":
        return center_crop(image, size, reducing_gap=_REDUCING_GAP)
    if mode == "border":
        return _border(image, size)
    target = resized_size(image.width, image.height, mode, size, enlarge=enlarge)
    return _bicubic(image, target, _REDUCING_GAP)


def center_crop(image: Image.Image, size: int, *, reducing_gap: float | None = None) -> Image.Image:
    """The middle square of the image whose short side has become ``size``."""
    width, height = _scaled(image.width, image.height, size / min(image.size))
    width, height = max(size, width), max(size, height)
    image = _bicubic(image, (width, height), reducing_gap)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _border(image: Image.Image, size: int) -> Image.Image:
    inner = _scaled(image.width, image.height, size / max(image.size))
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(_bicubic(image, inner, _REDUCING_GAP), ((size - inner[0]) // 2, (size - inner[1]) // 2))
    return canvas


def _scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    return max(1, round(width * scale)), max(1, round(height * scale))


def _bicubic(image: Image.Image, target: tuple[int, int], reducing_gap: float | None) -> Image.Image:
    if target == image.size:
        return image
    return image.resize(target, Image.Resampling.BICUBIC, reducing_gap=reducing_gap)
