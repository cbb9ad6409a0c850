"""Decoding: the same pixels in threads and in processes, in order, and nothing left when a process dies."""

import gc
import io
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coca.augment import random_view
from coca.decode import Decoder, Picture, ThreadDecoder, View, make_decoder
from coca.decode_processes import ProcessDecoder
from coca.errors import BadInput, RunFailed
from coca.images import ImageLimits, decode, model_pixels
from coca.reused_memory import ReusedMemory
from coca.shared_memory import SharedMemory
from coca.train_config import AugmentConfig, FeedConfig

HALF = AugmentConfig(min_crop_area=0.5)
VIEW = View(HALF, 3)
BROKEN = Picture(b"no picture", "f" * 32, 0)


def encoded(number: int, width: int = 60, height: int = 48, form: str = "JPEG") -> bytes:
    coarse = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(buffer, form)
    return buffer.getvalue()


PICTURES = [Picture(encoded(n), f"{n:032x}", n % 3) for n in range(21)]


def by_hand(pictures: list[Picture], size: int = 24) -> np.ndarray:
    pixels_BHWC = np.zeros((len(pictures), size, size, 3), np.uint8)
    for each, pixels_HWC in zip(pictures, pixels_BHWC, strict=True):
        image_HWC = np.asarray(decode(each.encoded, ImageLimits()).image)
        of = {"sample_id": each.sample_id, "lane_pass": each.lane_pass}
        random_view(image_HWC, pixels_HWC, HALF, seed=3, **of)
    return pixels_BHWC


def drawn(view: View, picture: Picture, size: int) -> np.ndarray:
    pixels_HWC = np.zeros((size, size, 3), np.uint8)
    view.draw(picture, pixels_HWC)
    return pixels_HWC


@pytest.fixture(scope="module", params=[ThreadDecoder, ProcessDecoder])
def decoder(request: pytest.FixtureRequest):
    found: Decoder = request.param(VIEW, 2)
    yield found
    found.close()


def test_pixels_are_those_of_the_view_in_order(decoder: Decoder) -> None:
    for count in (21, 1, 0):
        pixels = decoder.decode(PICTURES[:count], 24)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (count, 24, 24, 3)
        assert np.array_equal(pixels, by_hand(PICTURES)[:count])


def test_batches_of_other_sizes_may_be_under_way_together(decoder: Decoder) -> None:
    """Views for which the memory of a process grows, and small ones after that."""
    sizes = (24, 200, 17, 300)
    futures = [decoder.submit(PICTURES, size) for size in sizes]
    for size, future in zip(sizes, futures, strict=True):
        assert np.array_equal(future.result(30), by_hand(PICTURES, size))


def test_a_picture_that_does_not_decode_is_named_and_the_next_batch_decodes(decoder: Decoder) -> None:
    with pytest.raises(RunFailed, match=rf"^sample {BROKEN.sample_id} does not decode: not_an_image"):
        decoder.decode([*PICTURES, BROKEN, *PICTURES], 24)
    assert np.array_equal(decoder.decode(PICTURES[:3], 24), by_hand(PICTURES[:3]))


def test_memory_of_a_batch_that_failed_is_not_another_ones_too_early() -> None:
    """A process that has stopped in the middle may still draw there, when it goes on."""
    decoder = ProcessDecoder(VIEW, 2)
    made: list[int] = []
    decoder._memory = ReusedMemory(lambda size: made.append(size) or SharedMemory(size))
    try:
        while not all(worker.ready for worker in decoder._workers):
            time.sleep(0.01)
        decoder.decode(PICTURES, 64)
        stopped = decoder.process_ids[0]
        os.kill(stopped, signal.SIGSTOP)
        failing = decoder.submit([*PICTURES[1:], BROKEN], 64)
        with pytest.raises(RunFailed, match="does not decode"):
            failing.result(30)
        assert len(made) == 1
        del failing
        others = [decoder.submit(PICTURES, 64) for _ in range(3)]
        os.kill(stopped, signal.SIGCONT)
        for other in others:
            assert np.array_equal(other.result(30), by_hand(PICTURES, 64))
        assert len(made) == 1 + len(others)
    finally:
        decoder.close()


def test_processes_keep_the_memory_of_no_batch_that_is_gone() -> None:
    gc.collect()
    before = mappings("self")
    decoder = ProcessDecoder(VIEW, 1)
    try:
        for size in range(20, 40):
            decoder.decode(PICTURES, size)
        decoder.decode(PICTURES, 24)
        assert len(mappings(str(decoder.process_ids[0]))) <= 2
        assert len(mappings("self") - before) <= 2
    finally:
        decoder.close()


def mappings(process: str) -> set[str]:
    """The memories of batches that a process has mapped, by inode."""
    lines = Path(f"/proc/{process}/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "coca-pixels" in line}


def test_a_decoder_that_gives_up_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process had when it ended counts too."""
    monkeypatch.setattr("coca.decode_processes._DEATHS_IN_A_ROW", 0)
    decoder = ProcessDecoder(VIEW, 1)
    try:
        decoder.decode(PICTURES[:1], 24)
        (process,) = decoder.process_ids
        os.kill(process, signal.SIGSTOP)
        future = decoder.submit(PICTURES[:1], 24)
        while decoder._workers and not decoder._workers[0].chunks:
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)
        with pytest.raises(RunFailed, match="end by signal 9"):
            future.result(30)
    finally:
        decoder.close()


@pytest.mark.parametrize("kind", [ThreadDecoder, ProcessDecoder])
def test_closing_leaves_nobody_waiting(kind: type[ThreadDecoder | ProcessDecoder]) -> None:
    closed = kind(VIEW, 1)
    futures = [closed.submit(PICTURES * 50, 100) for _ in range(3)]
    closed.close()
    with pytest.raises(CancelledError):
        futures[-1].result(10)
    closed.close()


def test_centre_crops_are_what_evaluation_sees() -> None:
    large = Picture(encoded(0, 400, 320), "0" * 32, 0)
    image = decode(large.encoded, ImageLimits()).image
    assert np.array_equal(drawn(View(AugmentConfig(), 0), large, 32), model_pixels(image, 32))


def test_a_large_jpeg_is_decoded_scaled_and_looks_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The crop is the same share of the picture; the smallest crop keeps twice the pixels of the view."""
    seen: list[tuple[int, ...]] = []

    def spy(image_HWC: np.ndarray, *args: object, **named: object) -> None:
        seen.append(image_HWC.shape)
        random_view(image_HWC, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr("coca.decode.random_view", spy)
    picture = Picture(encoded(1, 1000, 800), "a" * 32, 0)
    pixels = drawn(VIEW, picture, 100)
    assert seen[0] == (400, 500, 3)  # 400 >= 2 * 100 / sqrt(0.5), and 200 is not
    assert np.abs(pixels.astype(int) - by_hand([picture], 100)[0]).mean() < 1
    drawn(VIEW, picture._replace(encoded=encoded(1, 1000, 800, "PNG")), 100)
    assert seen[1] == (800, 1000, 3)


def test_the_config_chooses() -> None:
    for feed, kind in ((FeedConfig(), ProcessDecoder), (FeedConfig(decode="threads", decode_workers=1), ThreadDecoder)):
        made = make_decoder(feed, HALF, 3)
        assert isinstance(made, kind)
        assert np.array_equal(made.decode(PICTURES[:2], 24), by_hand(PICTURES[:2]))
        made.close()
    with pytest.raises(BadInput, match="needs a Ray cluster"):
        make_decoder(FeedConfig(decode="ray"), HALF, 3)


def test_a_killed_process_is_replaced_and_its_pictures_decoded_again() -> None:
    decoder = ProcessDecoder(VIEW, 2)
    try:
        decoder.decode(PICTURES[:1], 24)
        first = decoder.process_ids
        future = decoder.submit(PICTURES * 20, 100)
        for victim in first:
            os.kill(victim, signal.SIGKILL)
        assert np.array_equal(future.result(60)[-21:], by_hand(PICTURES, 100))
        assert len(decoder.process_ids) == 2
        assert not set(first) & set(decoder.process_ids)
    finally:
        decoder.close()


def test_a_picture_that_ends_its_process_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A decoder that crashes: the worker's own module is replaced by one that does."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys, os\n"
        "if any('coca.decode_worker' in each for each in sys.orig_argv):\n"
        "    import coca.decode\n"
        "    real = coca.decode.View.draw\n"
        "    def draw(view, picture, pixels):\n"
        f"        return os._exit(70) if picture.sample_id == {BROKEN.sample_id!r} else real(view, picture, pixels)\n"
        "    coca.decode.View.draw = draw\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    decoder = ProcessDecoder(VIEW, 1)
    try:
        with pytest.raises(RunFailed, match=rf"sample {BROKEN.sample_id} has ended 2 decoder processes, by code 70"):
            decoder.decode([*PICTURES, BROKEN, *PICTURES], 24)
        assert np.array_equal(decoder.decode(PICTURES, 24), by_hand(PICTURES))
    finally:
        decoder.close()


def test_a_process_that_cannot_start_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    decoder = ProcessDecoder(VIEW, 1)
    try:
        for _ in range(2):  # the second comes when all has ended, as the first may
            with pytest.raises(RunFailed, match="end by code 1 without decoding anything"):
                decoder.submit(PICTURES, 24).result(30)
            decoder._thread.join(30)
    finally:
        decoder.close()


def test_nothing_is_left_of_a_decoder_whose_parent_is_killed() -> None:
    code = (
        "import sys, time; from coca.decode import View; from coca.decode_processes import ProcessDecoder\n"
        "from coca.train_config import AugmentConfig; from tests.coca.test_decode import PICTURES\n"
        "decoder = ProcessDecoder(View(AugmentConfig(), 0), 2)\n"
        "decoder.decode(PICTURES, 24); print(*decoder.process_ids, flush=True)\n"
        "while True: decoder.decode(PICTURES * 20, 100)"
    )
    before = set(os.listdir("/dev/shm"))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        children = [int(each) for each in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    deadline = time.monotonic() + 20
    while any(is_running(child) for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(child) for child in children)
    assert {name for name in set(os.listdir("/dev/shm")) - before if "coca" in name} == set()


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_decodes_knows_no_torch_where_nothing_is_cropped() -> None:
    code = (
        "import sys; from coca.decode import View; from coca.train_config import AugmentConfig\n"
        "from tests.coca.test_decode import PICTURES, drawn\n"
        "for area in (1, 0.5):\n"
        "    drawn(View(AugmentConfig(min_crop_area=area), 0), PICTURES[0], 24); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True"], done.stderr
