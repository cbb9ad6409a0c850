"""From a fetched body to the stored form."""

import hashlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coca.contract import Reason
from coca.images import ImageLimits, decode_rgb, phash, probe, resized_size
from pipelines.image_config import ImageConfig
from pipelines.prepare import StoredImage, prepare

LIMITS = ImageLimits()


def stored(body: bytes, **settings: Any) -> StoredImage:
    prepared = prepare(body, ImageConfig(**{"limits": LIMITS, "resize": "keep_ratio", "size": 100} | settings))
    assert prepared.source_sha256 == hashlib.sha256(body).hexdigest()
    assert prepared.stored is not None
    assert prepared.stored.sha256 == hashlib.sha256(prepared.stored.image).hexdigest()
    header = probe(prepared.stored.image, LIMITS)
    assert (header.format, header.width, header.height) == (
        prepared.stored.format,
        prepared.stored.width,
        prepared.stored.height,
    )
    return prepared.stored


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_bytes_that_need_no_change_are_stored_untouched(pages: Any, kind: str) -> None:
    body = pages.picture("a", (90, 60), kind)
    image = stored(body)
    assert image.image == body
    assert (image.format, image.width, image.height) == (kind, 90, 60)
    assert (image.original_width, image.original_height) == (90, 60)
    assert image.phash == phash(decode_rgb(body, LIMITS))


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"resize": "no"}, (400, 300)),
        ({"resize": "keep_ratio"}, (133, 100)),
        ({"resize": "keep_ratio_largest"}, (100, 75)),
        ({"resize": "center_crop"}, (100, 100)),
        ({"resize": "border"}, (100, 100)),
    ],
)
def test_resizing(pages: Any, settings: dict[str, Any], size: tuple[int, int]) -> None:
    image = stored(pages.picture("a", (400, 300)), **settings)
    assert (image.width, image.height) == size
    assert (image.original_width, image.original_height) == (400, 300)


@pytest.mark.parametrize(("mode", "size"), [("keep_ratio", (1000, 809)), ("keep_ratio_largest", (1005, 809))])
def test_scaled_decoding_does_not_change_the_size(pages: Any, mode: Any, size: tuple[int, int]) -> None:
    """At a quarter both are 203 pixels high, which is another ratio."""
    image = stored(pages.picture("a", size), resize=mode)
    assert (image.width, image.height) == resized_size(*size, mode, 100)
    quarter = (-(-size[0] // 4), 203)
    assert resized_size(*quarter, mode, 100) != resized_size(*size, mode, 100)


def test_enlarging_is_asked_for(pages: Any) -> None:
    body = pages.picture("a", (90, 60))
    assert stored(body, resize="keep_ratio_largest").image == body
    image = stored(body, enlarge=True)
    assert (image.width, image.height, image.original_width, image.original_height) == (150, 100, 90, 60)
    image = stored(body, enlarge=True, resize="keep_ratio_largest")
    assert (image.width, image.height) == (100, 67)


def test_the_header_is_read_once(pages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr("pipelines.prepare.probe", lambda *args: calls.append(args) or probe(*args))
    monkeypatch.setattr("coca.images.probe", lambda *_: pytest.fail("probed again"))
    assert prepare(pages.picture("a"), ImageConfig(size=64)).stored is not None
    assert len(calls) == 1


def test_a_format_not_stored_is_encoded_anew(pages: Any) -> None:
    image = stored(pages.picture("a", (90, 60), "png"), store_formats=("jpeg",), encode_format="webp")
    assert (image.format, image.width, image.height) == ("webp", 90, 60)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_modes_that_decoders_read_differently_are_encoded_anew(pages: Any, mode: str) -> None:
    image = stored(pages.picture("a", (90, 60), "png", mode=mode))
    assert image.format == "jpeg"


def test_gif_is_never_stored(pages: Any) -> None:
    assert stored(pages.picture("a", (90, 60), "gif")).format == "jpeg"


def test_a_turned_image_is_stored_upright(pages: Any) -> None:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(pages.picture("a", (90, 60)))).save(buffer, "jpeg", exif=exif)
    image = stored(buffer.getvalue(), encode_format="png")
    assert (image.width, image.height) == (60, 90)
    assert (image.original_width, image.original_height) == (60, 90)
    expected = decode_rgb(buffer.getvalue(), LIMITS)
    np.testing.assert_array_equal(np.asarray(decode_rgb(image.image, LIMITS)), np.asarray(expected))


def test_a_refused_body_keeps_its_digest(pages: Any) -> None:
    body = pages.picture("a", (90, 60))
    refusals = {
        Reason.NOT_AN_IMAGE: (b"<html>", LIMITS),
        Reason.TRUNCATED_IMAGE: (body[: len(body) // 2], LIMITS),
        Reason.BODY_TOO_SMALL: (body, ImageLimits(min_bytes=len(body) + 1)),
        Reason.IMAGE_TOO_SMALL: (body, ImageLimits(min_side=61)),
        Reason.ASPECT_RATIO: (body, ImageLimits(max_aspect_ratio=1.4)),
        Reason.TOO_MANY_PIXELS: (body, ImageLimits(max_pixels=5399)),
    }
    for reason, (data, limits) in refusals.items():
        prepared = prepare(data, ImageConfig(limits=limits))
        assert (prepared.reason, prepared.stored) == (reason, None)
        assert prepared.source_sha256 == hashlib.sha256(data).hexdigest()


def test_the_same_body_is_prepared_to_the_same_bytes(pages: Any) -> None:
    body = pages.picture("a", (400, 300))
    assert stored(body) == stored(body)
