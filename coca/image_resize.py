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


def resize(
    image: Image.Image,
    mode: ResizeMode,
    size: int,
    *,
    enlarge: bool = False,
    original: tuple[int, int] | None = None,
) -> Image.Image:
    """Resize with bicubic antialiasing.

    Args:
        mode: ``no``; ``keep_ratio`` (short side becomes ``size``) and ``keep_ratio_largest`` (long side);
            ``center_crop`` and ``border`` (white), which give ``size`` x ``size``.
        size: pixels.
        enlarge: whether the two modes that keep the ratio also enlarge; the two that give squares always do.
        original: width and height that the geometry follows, where the image was decoded scaled and its own size is
            only nearly in their ratio.
    """
    width, height = original or image.size
    if mode == "center_crop":
        return _middle(_bicubic(image, _covering(width, height, size), _REDUCING_GAP), size)
    if mode == "border":
        return _framed(_bicubic(image, _scaled(width, height, size / max(width, height)), _REDUCING_GAP), size)
    return _bicubic(image, resized_size(width, height, mode, size, enlarge=enlarge), _REDUCING_GAP)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle square of the image whose short side has become ``size``, by the bicubic filter alone."""
    return _middle(_bicubic(image, _covering(*image.size, size), None), size)


def _middle(image: Image.Image, size: int) -> Image.Image:
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _framed(image: Image.Image, size: int) -> Image.Image:
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(image, ((size - image.width) // 2, (size - image.height) // 2))
    return canvas


def _covering(width: int, height: int, size: int) -> tuple[int, int]:
    width, height = _scaled(width, height, size / min(width, height))
    return max(size, width), max(size, height)


def _scaled(width: int, height: int, scale: float) -> tuple[int, int]:
    return max(1, round(width * scale)), max(1, round(height * scale))


def _bicubic(image: Image.Image, target: tuple[int, int], reducing_gap: float | None) -> Image.Image:
    if target == image.size:
        return image
    return image.resize(target, Image.Resampling.BICUBIC, reducing_gap=reducing_gap)
