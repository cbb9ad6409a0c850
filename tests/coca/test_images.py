"""Untrusted bytes: what is refused and why, what comes out right, and what changes size how."""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from coca.contract import Reason
from coca.images import (
    ImageLimits,
    ImageProblem,
    decode,
    decode_rgb,
    encode,
    model_pixels,
    phash,
    probe,
    resize,
)

# pytest starts every test with filters of its own: the one that coca.images sets, again.
pytestmark = pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.")

LIMITS = ImageLimits()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width: int, height: int, seed: int = 0) -> Image.Image:
    return noise(6, 6, seed).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def reason_for(data: bytes, limits: ImageLimits = LIMITS) -> Reason:
    with pytest.raises(ImageProblem) as caught:
        decode_rgb(data, limits)
    return caught.value.reason


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif"])
def test_probe_reads_format_and_size_as_pillow_does(kind: str) -> None:
    header = probe(saved(smooth(83, 41), kind), LIMITS)
    assert (header.format, header.width, header.height) == (kind, 83, 41)


def test_probe_reads_the_three_kinds_of_webp() -> None:
    lossy, lossless = saved(smooth(83, 41), "webp"), saved(smooth(83, 41), "webp", lossless=True)
    extended = saved(smooth(83, 41).convert("RGBA"), "webp", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")
    assert [data[12:16] for data in (lossy, lossless, extended)] == [b"VP8 ", b"VP8L", b"VP8X"]
    for data in (lossy, lossless, extended):
        assert (probe(data, LIMITS).width, probe(data, LIMITS).height) == (83, 41)


def test_probe_reads_progressive_jpeg_with_metadata_before_the_frame() -> None:
    data = saved(smooth(70, 50), "jpeg", progressive=True, comment=b"\xff\xc0 no frame " * 50)
    assert (probe(data, LIMITS).width, probe(data, LIMITS).height) == (70, 50)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.NOT_AN_IMAGE),
        (b"<html><body>gone</body></html>", Reason.NOT_AN_IMAGE),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.NOT_AN_IMAGE),
        (b"%!PS-Adobe-3.0 EPSF-3.0", Reason.NOT_AN_IMAGE),
        (b"\xff\xd8\xff", Reason.TRUNCATED_IMAGE),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", Reason.TRUNCATED_IMAGE),
        (b"\xff\xd8\xff\xd9" + b"\0" * 64, Reason.CORRUPT_IMAGE),
        (b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0dIDAT" + b"\0" * 40, Reason.CORRUPT_IMAGE),
        (b"RIFF\x20\0\0\0WEBPVP9 " + b"\0" * 40, Reason.CORRUPT_IMAGE),
        (b"GIF89a\x01", Reason.TRUNCATED_IMAGE),
    ],
)
def test_bytes_that_are_no_image_of_ours(data: bytes, reason: Reason) -> None:
    assert reason_for(data) is reason


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif"])
def test_cut_in_half_is_truncated(kind: str) -> None:
    data = saved(noise(90, 90), kind)
    assert reason_for(data[: len(data) // 2]) is Reason.TRUNCATED_IMAGE


def test_damaged_in_the_middle_is_corrupt() -> None:
    data = bytearray(saved(smooth(90, 90), "png"))
    data[2000:2020] = bytes(20)
    assert reason_for(bytes(data)) is Reason.CORRUPT_IMAGE


def scan_start(data: bytes) -> int:
    return data.rindex(b"\xff\xda") + 14


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("restart", [0, 3])
def test_a_jpeg_whose_data_ends_before_its_picture_is_truncated(mode: str, subsampling: int, restart: int) -> None:
    """libjpeg fills the rest with grey and only warns, which Pillow hides."""
    image = noise(200, 160).convert(mode)
    data = saved(image, "jpeg", subsampling=subsampling, restart_marker_blocks=restart)
    half = scan_start(data) + (len(data) - scan_start(data)) // 2
    assert decode_rgb(data, LIMITS).size == (200, 160)
    assert reason_for(data[:half] + b"\xff\xd9") is Reason.TRUNCATED_IMAGE
    if not restart:  # a restart marker puts the decoder back in step: one patch is wrong, the end is not
        assert reason_for(data[: half - 1024] + data[half:]) is Reason.TRUNCATED_IMAGE


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_blocks": 2}])
def test_a_jpeg_that_ends_in_grey_is_complete(options: dict[str, object]) -> None:
    picture = smooth(120, 90)
    picture.paste((128, 128, 128), (60, 40, 120, 90))
    for image in (picture, Image.new("RGB", (33, 17), (128, 128, 128)), Image.new("L", (8, 8), 128)):
        data = saved(image, "jpeg", **options)
        for trailing in (b"", b"\0\0", b"behind the picture \xff\xd9"):
            decoded = decode_rgb(data + trailing, LIMITS)
            assert decoded.getpixel((image.width - 1, image.height - 1)) == (128, 128, 128)


def test_a_jpeg_of_very_many_scans_is_refused_before_a_decoder_sees_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(smooth(64, 64), "jpeg", progressive=True)
    last = data.rindex(b"\xff\xda")
    bomb = data[:last] + data[last:-2] * 70 + b"\xff\xd9"
    preview = data[:2] + b"\xff\xe1" + struct.pack(">H", 402) + b"\xff\xda" * 200 + data[2:]
    for harmless in (data, data[:last] + data[last:-2] * 20 + b"\xff\xd9", preview, data + b"\xff\xda" * 100):
        assert decode_rgb(harmless, LIMITS).size == (64, 64)
    sequential = saved(smooth(64, 64).convert("L"), "jpeg")
    scan = sequential[sequential.rindex(b"\xff\xda") : -2]
    assert probe(sequential[:-2] + scan * 100 + b"\xff\xd9", LIMITS).width == 64  # a decoder reads the first alone
    parts = saved(smooth(64, 64), "jpeg", subsampling=0)
    first = parts.rindex(b"\xff\xda")
    one = b"\xff\xda\0\x08\x01\x01\0\0\x3f\0" + bytes(4)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow was asked"))
    assert reason_for(parts[:first] + one * 70 + b"\xff\xd9") is Reason.CORRUPT_IMAGE
    assert reason_for(bomb) is Reason.CORRUPT_IMAGE


def test_limits_are_held_against_the_header() -> None:
    data = saved(smooth(200, 50), "png")
    assert reason_for(data, ImageLimits(max_bytes=len(data) - 1)) is Reason.BODY_TOO_LARGE
    assert reason_for(data, ImageLimits(min_bytes=len(data) + 1)) is Reason.BODY_TOO_SMALL
    assert reason_for(data, ImageLimits(max_pixels=9_999)) is Reason.TOO_MANY_PIXELS
    assert reason_for(data, ImageLimits(min_side=51)) is Reason.IMAGE_TOO_SMALL
    assert reason_for(data, ImageLimits(max_aspect_ratio=3.99)) is Reason.ASPECT_RATIO
    assert reason_for(data, ImageLimits(formats=("jpeg",))) is Reason.NOT_AN_IMAGE
    exact = ImageLimits(min_bytes=len(data), max_bytes=len(data), max_pixels=10_000, min_side=50, max_aspect_ratio=4)
    assert decode_rgb(data, exact).size == (200, 50)


def test_bombs_are_refused_before_a_decoder_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow was asked"))
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(bytes(10_000)))
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\0" * 4 + b"\xfe\x3f\0" * 2
    webp = b"RIFF" + struct.pack("<I", len(canvas) + 4) + b"WEBP" + canvas
    jpeg = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 60_000, 60_000, 3) + bytes(9)
    gif = b"GIF89a" + struct.pack("<HHBBB", 65_000, 65_000, 0, 0, 0)
    for bomb in (png, webp, jpeg, gif):
        assert reason_for(bomb) is Reason.TOO_MANY_PIXELS


def test_a_gif_frame_larger_than_its_header_is_held_against_the_limits() -> None:
    data = bytearray(saved(smooth(64, 64).convert("P"), "gif"))
    data[6:10] = struct.pack("<HH", 1, 1)
    assert reason_for(bytes(data), ImageLimits(max_pixels=64 * 64 - 1)) is Reason.TOO_MANY_PIXELS


def test_transparency_goes_over_white() -> None:
    layer = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert decode_rgb(saved(layer, "png"), LIMITS).getpixel((3, 3)) == (255, 127, 127)
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    for kind in ("png", "webp"):
        assert decode_rgb(saved(clear, kind), LIMITS).getpixel((3, 3)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    assert decode_rgb(saved(palette, "png", transparency=1), LIMITS).getpixel((0, 0)) == (255, 255, 255)
    assert decode_rgb(saved(palette, "png"), LIMITS).getpixel((0, 0)) == (0, 0, 255)


def test_sixteen_bit_grey_keeps_its_tone() -> None:
    data = saved(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "png")
    assert decode_rgb(data, LIMITS).getpixel((0, 0)) == (156, 156, 156)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK"])
def test_other_modes_come_out_as_pillow_shows_them(mode: str) -> None:
    image = smooth(32, 32).convert(mode)
    data = saved(image, "jpeg" if mode == "CMYK" else "png")
    with Image.open(io.BytesIO(data)) as reopened:
        expected = np.asarray(reopened.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(decode_rgb(data, LIMITS)), expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(smooth(40, 24), "jpeg", exif=exif, quality=95)
    decoded = decode(data, LIMITS)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image)
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(expected))
    assert (decoded.original_width, decoded.original_height) == expected.size
    assert decoded.plain == (orientation == 1)


def test_broken_exif_is_no_reason_to_refuse() -> None:
    data = saved(smooth(40, 24), "jpeg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert decode_rgb(data, LIMITS).size == (40, 24)


def test_only_the_first_frame_of_an_animation() -> None:
    red, blue = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    for kind in ("gif", "webp"):
        data = saved(red, kind, save_all=True, append_images=[blue], lossless=True)
        decoded = decode(data, LIMITS)
        assert decoded.image.getpixel((8, 8))[0] > 250
        assert not decoded.plain


def test_scaled_decoding_of_jpeg_keeps_twice_the_wanted_side() -> None:
    data = saved(smooth(1600, 1200), "jpeg")
    decoded = decode(data, LIMITS, short_side=100)
    assert decoded.image.size == (400, 300)  # 1/4: 1/8 would give 150
    assert (decoded.original_width, decoded.original_height) == (1600, 1200)
    assert decode(data, LIMITS, short_side=700).image.size == (1600, 1200)
    small = np.asarray(resize(decoded.image, "keep_ratio", 100), dtype=float)
    full = np.asarray(resize(decode_rgb(data, LIMITS), "keep_ratio", 100), dtype=float)
    assert np.abs(small - full).mean() < 1.0


def test_encode_gives_the_format_asked_for() -> None:
    for kind in ("jpeg", "png", "webp"):
        assert probe(encode(smooth(30, 30), kind, 90), LIMITS).format == kind  # type: ignore[arg-type]
    image = smooth(64, 64)
    assert len(encode(image, "jpeg", 95)) > len(encode(image, "jpeg", 50))
    np.testing.assert_array_equal(np.asarray(decode_rgb(encode(image, "png", 1), LIMITS)), np.asarray(image))


def test_phash_follows_its_definition() -> None:
    image = smooth(300, 200, seed=3)
    small = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=2.0)
    grey = np.asarray(small, dtype=float)
    values = []
    for u in range(8):
        for v in range(8):
            terms = [
                grey[y, x] * np.cos(np.pi * u * (2 * y + 1) / 64) * np.cos(np.pi * v * (2 * x + 1) / 64)
                for y in range(32)
                for x in range(32)
            ]
            values.append(sum(terms))
    bits = "".join("1" if value > np.median(values[1:]) else "0" for value in values)
    assert phash(image) % 2**64 == int(bits, 2)


def test_phash_is_near_for_the_same_picture_and_far_for_another() -> None:
    image, other = smooth(200, 200, seed=1), smooth(200, 200, seed=2)
    again = decode_rgb(encode(image.resize((120, 120)), "jpeg", 60), LIMITS)

    def distance(a: Image.Image, b: Image.Image) -> int:
        return ((phash(a) ^ phash(b)) % 2**64).bit_count()

    assert distance(image, again) <= 4
    assert distance(image, other) >= 16
    assert -(2**63) <= phash(image) < 2**63


def test_model_pixels_crop_the_centre() -> None:
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    seen = model_pixels(Image.fromarray(pixels), 20)
    assert seen.shape == (20, 20, 3)
    assert seen.dtype == np.uint8
    assert (seen == 200).all()
    assert model_pixels(smooth(7, 5), 16).shape == (16, 16, 3)
    assert model_pixels(smooth(101, 33), 32).shape == (32, 32, 3)


def test_a_problem_survives_pickling() -> None:
    problem = ImageProblem(Reason.CORRUPT_IMAGE, "png: broken")
    assert pickle.loads(pickle.dumps(problem)).reason is Reason.CORRUPT_IMAGE
    assert str(problem) == "corrupt_image: png: broken"
