"""Scenes as encoded files: JPEG, PNG and WebP, 64 to 256 pixels, square or nearly so."""

import base64
import io
import random
from dataclasses import dataclass

from PIL import Image

from jobs.demo.scenes import Scene, render

_FORMATS = {"jpeg": 0.6, "png": 0.25, "webp": 0.15}
_SIDES = (64, 72, 96, 128, 160, 192, 256)
_SUFFIX = {"jpeg": ".jpg", "png": ".png", "webp": ".webp"}
_ORIENTATION = 0x0112
_TURNED_LEFT = 6  # the file's rows must be turned right to stand upright


@dataclass(frozen=True)
class Picture:
    """An encoded image and its true format."""

    data: bytes
    format: str

    @property
    def suffix(self) -> str:
        return _SUFFIX[self.format]

    @property
    def content_type(self) -> str:
        return f"image/{self.format}"


def picture(scene: Scene, rng: random.Random, *, format: str | None = None) -> Picture:  # noqa: A002
    """``scene`` in a drawn size, shape and (where not given) format."""
    chosen = format or rng.choices(list(_FORMATS), list(_FORMATS.values()))[0]
    return Picture(_encode(render(scene, _draw_size(rng), rng), chosen, rng), chosen)


def turned_picture(scene: Scene, rng: random.Random) -> Picture:
    """A JPEG whose rows lie on their side; only its EXIF orientation says how it stands."""
    image = render(scene, _draw_size(rng), rng).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[_ORIENTATION] = _TURNED_LEFT
    return Picture(_encode(image, "jpeg", rng, exif=exif), "jpeg")


def small_picture(scene: Scene, width: int, height: int, rng: random.Random) -> Picture:
    """A PNG of exactly this size."""
    return Picture(_encode(render(scene, (width, height), rng), "png", rng), "png")


def data_uri(image: bytes) -> str:
    """An encoded picture as a data URI."""
    kind = "png" if image.startswith(b"\x89PNG") else "webp" if image.startswith(b"RIFF") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


def _draw_size(rng: random.Random) -> tuple[int, int]:
    side = rng.choice(_SIDES)
    longer = round(side * rng.uniform(1.0, 1.2)) if rng.random() < 0.4 else side
    return (longer, side) if rng.random() < 0.5 else (side, longer)


def _encode(image: Image.Image, format: str, rng: random.Random, **options: object) -> bytes:  # noqa: A002
    if format != "png":
        options["quality"] = rng.randint(86, 95)
    if format == "webp":
        options["method"] = 2  # a third of the default's time, a little larger
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()
