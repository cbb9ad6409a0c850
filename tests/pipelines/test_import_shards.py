import hashlib
import io
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from coca.contract import Reason
from coca.images import ImageLimits
from pipelines.image_config import ImageConfig
from pipelines.import_shards import ImportedRow, import_reason, list_shards, read_shard, restore_source
from pipelines.prepare import prepare

REAL = Path(__file__).parents[1] / "data/img2dataset/webdataset"
ANY_SIZE = ImageConfig(limits=ImageLimits(min_side=8))


def row(
    status: str | None = "success", message: str | None = None, body: bytes | None = None, **known: object
) -> ImportedRow:
    values = {"original_width": None, "original_height": None, "source_sha256": None} | known
    return ImportedRow("u", "c", None, body, status, message, imported_at=datetime(2026, 1, 1, tzinfo=UTC), **values)


def png(size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "red").save(out, "PNG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("HTTP Error 404: Not Found", Reason.NOT_FOUND),
        ("HTTP Error 410: Gone", Reason.NOT_FOUND),
        ("HTTP Error 403: Forbidden", Reason.CLIENT_ERROR),
        ("HTTP Error 429: Too Many Requests", Reason.RATE_LIMITED),
        ("HTTP Error 503: Service Unavailable", Reason.SERVER_ERROR),
        ("HTTP Error 504: Gateway Timeout", Reason.SERVER_ERROR),
        (
            "HTTP Error 302: The HTTP server returned a redirect error that would lead to an infinite loop.",
            Reason.TOO_MANY_REDIRECTS,
        ),
        ("Use of image disallowed by X-Robots-Tag directive", Reason.OPTED_OUT),
        ("<urlopen error timed out>", Reason.TIMEOUT),
        ("The read operation timed out", Reason.TIMEOUT),
        ("<urlopen error [Errno -2] Name or service not known>", Reason.DNS_FAILURE),
        ("<urlopen error [Errno -3] Temporary failure in name resolution>", Reason.DNS_FAILURE),
        ("<urlopen error [Errno -5] No address associated with hostname>", Reason.DNS_FAILURE),
        ("<urlopen error [Errno 111] Connection refused>", Reason.CONNECT_ERROR),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", Reason.CONNECT_ERROR),
        ("Remote end closed connection without response", Reason.CONNECT_ERROR),
        ("IncompleteRead(100 bytes read, 300 more expected)", Reason.BODY_INCOMPLETE),
        ("unknown url type: 'data:image/png;base64,xx'", Reason.INVALID_URL),
        ("hash mismatch", Reason.CORRUPT_IMAGE),
        (None, Reason.SERVER_ERROR),
    ],
)
def test_reasons_of_failed_downloads(message: str | None, reason: Reason) -> None:
    assert import_reason(row("failed_to_download", message)) is reason


@pytest.mark.parametrize(
    ("status", "message", "body", "reason"),
    [
        ("failed_to_resize", "image too small", None, Reason.IMAGE_TOO_SMALL),
        ("failed_to_resize", "image area too large", None, Reason.TOO_MANY_PIXELS),
        ("failed_to_resize", "aspect ratio too large", None, Reason.ASPECT_RATIO),
        ("failed_to_resize", "Image decoding error", None, Reason.CORRUPT_IMAGE),
        ("failed_to_resize", "OpenCV(4.8) error", b"x", Reason.CORRUPT_IMAGE),
        ("body_too_large", None, None, Reason.BODY_TOO_LARGE),
        ("image_missing", None, None, Reason.BODY_INCOMPLETE),
        ("something new", None, None, Reason.BODY_INCOMPLETE),
        ("success", None, b"x", None),
        (None, None, b"x", None),
    ],
)
def test_other_reasons(status: str | None, message: str | None, body: bytes | None, reason: Reason | None) -> None:
    assert import_reason(row(status, message, body)) is reason


def test_an_image_is_stored_as_it_is_with_the_size_it_once_had() -> None:
    body = png((40, 30))
    known = row(body=body, original_width=400, original_height=300, source_sha256="a" * 64)
    restored = restore_source(known, prepare(body, ANY_SIZE))
    assert restored.source_sha256 == "a" * 64
    assert restored.stored is not None
    assert restored.stored.image == body
    assert (restored.stored.width, restored.stored.height) == (40, 30)
    assert (restored.stored.original_width, restored.stored.original_height) == (400, 300)


def test_what_the_shard_does_not_say_stays() -> None:
    body = png((40, 30))
    for prepared in (prepare(body, ANY_SIZE), prepare(b"<html>", ANY_SIZE)):
        assert restore_source(row(body=body), prepared) == prepared
    assert prepare(body, ANY_SIZE).source_sha256 == hashlib.sha256(body).hexdigest()


def test_the_real_output_from_shards_to_verdicts() -> None:
    verdicts: dict[str, Reason | None] = {}
    for shard in list_shards(str(REAL)):
        for each in read_shard(shard):
            reason = import_reason(each)
            if each.body is not None:
                reason = restore_source(each, prepare(each.body, ANY_SIZE)).reason
            verdicts[str(each.url).rpartition("/")[2]] = reason
    assert verdicts == {
        "1.jpg": None,
        "2.png": None,
        "gone.jpg": Reason.NOT_FOUND,
        "broken.jpg": Reason.CORRUPT_IMAGE,
        "slow.jpg": Reason.TIMEOUT,
        "robots.jpg": Reason.OPTED_OUT,
        "500.jpg": Reason.SERVER_ERROR,
        "refused.jpg": Reason.CONNECT_ERROR,
        "x.jpg": Reason.DNS_FAILURE,
    }
