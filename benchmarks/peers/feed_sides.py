"""The sides of benchmarks/feed.py, each a function that a process of its own runs: pictures to batches of pixels.

All decode and crop with the same function, `coca.decode.View.draw`, and all give uint8 batches (B, 224, 224, 3) in host
memory. Ours tokenizes and orders beside.
"""

import itertools
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from peers.feed_corpus import read_bodies

from coca.config import ModelConfig, Preprocessing, TextConfig, ViTConfig
from coca.cpus import usable_cpus
from coca.decode import Picture, View, make_decoder
from coca.train_config import AugmentConfig, FeedConfig, TrainConfig

SIZE, BATCH, LANES, WINDOW = 224, 96, 4, 2
AUGMENT = AugmentConfig(min_crop_area=0.5)
VIEW = View(AUGMENT, 0)
Timing = dict[str, float]


def ours(work: Path, samples: int, decode: str) -> Timing:
    """Our feed, decoding in threads or in processes."""
    from coca.feed import Feed

    config, feed = our_config(BATCH), FeedConfig(decode=decode)  # type: ignore[arg-type]
    began = time.perf_counter()
    decoder = make_decoder(feed, AUGMENT, config.seed)
    reader = Feed(our_mixture(work), config, feed, rank=0, world_size=1, decoder=decoder)
    batches = reader.batches(0)
    found = timed((batch.pixels_BHWC for batch in batches), samples, began)
    batches.close()
    reader.close()
    return found


def first_batches_s(work: Path, starts: list[int]) -> list[float]:
    """`first_batch_s` of each, after one that is thrown away: what Python imports late counts for none."""
    first_batch_s(work, 0)
    return [first_batch_s(work, start) for start in starts]


def first_batch_s(work: Path, start: int) -> float:
    """From opening the dataset to the first batch of a run that stands at sample ``start``."""
    from coca.feed import Feed

    config, feed = our_config(BATCH), FeedConfig()
    began = time.perf_counter()
    decoder = make_decoder(feed, AUGMENT, config.seed)
    reader = Feed(our_mixture(work), config, feed, rank=0, world_size=1, decoder=decoder)
    batches = reader.batches(start // BATCH)
    next(batches)
    seconds = time.perf_counter() - began
    batches.close()
    reader.close()
    return seconds


def our_mixture(work: Path) -> Any:
    from coca.dataset import Dataset
    from coca.mixture import Mixture, Source

    return Mixture([Source(Dataset(str(work / "dataset")), 1.0)])


def our_config(batch_size: int) -> TrainConfig:
    """Of a small model: its training step is to be short, and still ten times the decoding of its batch."""
    text = TextConfig(
        vocab_size=512,
        context_length=32,
        width=256,
        heads=4,
        mlp_width=1024,
        unimodal_layers=2,
        multimodal_layers=2,
    )
    vision = ViTConfig(image_size=SIZE, patch_size=16, width=256, layers=4, heads=4, mlp_width=1024)
    model = ModelConfig(vision=vision, text=text, embed_dim=256, pooler_heads=4, caption_queries=64)
    return TrainConfig(model=model, batch_size=batch_size, lanes=LANES, shuffle_window=WINDOW, augment=AUGMENT)


def ray_data(work: Path, samples: int) -> Timing:
    """`iter_torch_batches` of Ray Data, decoding in `map_batches` tasks, on as many CPUs as there are.

    Its blocks are of about one batch: with its default, 128 MiB, the first batch comes late, and then many at once."""
    os.environ |= {"RAY_DATA_DISABLE_PROGRESS_BARS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    import ray
    import torch  # noqa: F401  as all have it imported before they begin

    ray.init(num_cpus=usable_cpus(), include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().target_max_block_size = BATCH * SIZE * SIZE * 3
    began = time.perf_counter()
    rows = ray.data.read_parquet(str(work / "dataset/samples")).select_columns(["sample_id", "image"])
    batches = rows.map_batches(_decode_columns, batch_size=BATCH).iter_torch_batches(
        batch_size=BATCH, prefetch_batches=2, drop_last=True
    )
    found = timed((batch["pixels"] for batch in batches), samples, began)
    ray.shutdown()
    return found


def _decode_columns(columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    pixels_BHWC = np.empty((len(columns["image"]), SIZE, SIZE, 3), np.uint8)
    for image, sample_id, pixels_HWC in zip(columns["image"], columns["sample_id"], pixels_BHWC, strict=True):
        VIEW.draw(Picture(image, sample_id, 0), pixels_HWC)
    return {"pixels": pixels_BHWC}


def webdataset(work: Path, samples: int, packages: str) -> Timing:
    """webdataset in a DataLoader of torch with a worker for each CPU; ``packages``: where webdataset is installed."""
    sys.path.append(packages)  # last: all else is ours
    import torch
    import webdataset as wds

    began = time.perf_counter()
    shards = sorted(str(path) for path in (work / "shards").iterdir())
    pipeline = wds.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False).shuffle(500)
    pipeline = pipeline.map(_decode_member).batched(BATCH, partial=False)
    loader = torch.utils.data.DataLoader(pipeline, batch_size=None, num_workers=usable_cpus(), prefetch_factor=2)
    return timed((pixels for (pixels,) in loader), samples, began)


def _decode_member(member: dict[str, Any]) -> tuple[np.ndarray]:
    pixels_HWC = np.empty((SIZE, SIZE, 3), np.uint8)
    VIEW.draw(Picture(member["jpg"], member["__key__"], 0), pixels_HWC)
    return (pixels_HWC,)


def bare_threads(work: Path, samples: int) -> Timing:
    """Decode and crop alone: a thread for each CPU, pictures in memory, all pixels into the same memory."""
    pictures = read_pictures(work, samples)
    warm_up(pictures)
    numbers = itertools.count()  # next() of a count is atomic

    def share() -> None:
        pixels_HWC = np.empty((SIZE, SIZE, 3), np.uint8)
        while (number := next(numbers)) < len(pictures):
            VIEW.draw(pictures[number], pixels_HWC)

    threads = [threading.Thread(target=share) for _ in range(usable_cpus())]
    began, cpu_began = time.perf_counter(), time.process_time()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return {"samples_per_s": len(pictures) / seconds, "own_cpu_ms": 1000 * cpu_seconds / len(pictures)}


def bare_processes(work: Path, samples: int) -> Timing:
    """The same in a process for each CPU, each with its own share of the pictures."""
    context, cpus = multiprocessing.get_context("spawn"), usable_cpus()
    with context.Manager() as manager, ProcessPoolExecutor(cpus, mp_context=context) as pool:
        gate = manager.Barrier(cpus)
        shares = [pool.submit(_bare_share, work, samples, place, cpus, gate) for place in range(cpus)]
        done = [share.result() for share in shares]
    return {"samples_per_s": sum(count for count, _ in done) / max(seconds for _, seconds in done)}


def _bare_share(work: Path, samples: int, place: int, of: int, gate: Any) -> tuple[int, float]:
    pictures = read_pictures(work, samples)[place::of]
    warm_up(pictures)
    pixels_HWC = np.empty((SIZE, SIZE, 3), np.uint8)
    gate.wait()
    began = time.perf_counter()
    for picture in pictures:
        VIEW.draw(picture, pixels_HWC)
    return len(pictures), time.perf_counter() - began


def read_pictures(work: Path, samples: int) -> list[Picture]:
    bodies = itertools.islice(read_bodies(work), samples)
    return [Picture(body, f"{number:032x}", 0) for number, (body, *_) in enumerate(bodies)]


def warm_up(pictures: list[Picture]) -> None:
    for picture in pictures[:50]:
        VIEW.draw(picture, np.empty((SIZE, SIZE, 3), np.uint8))


def timed(batches: Iterable[Any], samples: int, began: float) -> Timing:
    """Seconds to the first batch; samples a second over the last four fifths of ``samples``, and over all of them from
    the beginning, which no batches that had been prepared before the first came make look better; CPU milliseconds a
    sample of this process over the last four fifths."""
    wanted = samples // BATCH
    warm = max(1, wanted // 5)
    times, cpu_times = [], []
    for number, pixels in enumerate(batches, 1):
        assert tuple(pixels.shape) == (BATCH, SIZE, SIZE, 3), pixels.shape
        times.append(time.perf_counter())
        cpu_times.append(time.process_time())
        if number == wanted:
            break
    assert len(times) > warm, f"{len(times)} batches came of {wanted}"
    timed_samples = BATCH * (len(times) - warm)
    return {
        "samples_per_s": timed_samples / (times[-1] - times[warm - 1]),
        "samples_per_s_with_start": BATCH * len(times) / (times[-1] - began),
        "first_batch_s": times[0] - began,
        "own_cpu_ms": 1000 * (cpu_times[-1] - cpu_times[warm - 1]) / timed_samples,
    }


def training(work: Path, steps: int, rounds: int, batch_size: int) -> dict[str, Any]:
    """Seconds of training steps on all CPUs, on batches of the mock feed and of ours, in turns; and CPU seconds that
    decoding takes of each."""
    import torch

    from coca.feed import Feed, normalize
    from coca.mock_feed import MockFeed
    from coca.model import CoCa
    from coca.objective import Objective
    from coca.train_config import LossConfig

    torch.set_num_threads(usable_cpus())
    config = our_config(batch_size)
    torch.manual_seed(0)
    model = CoCa(config.model).train()
    objective, optimizer = Objective(model, LossConfig()), torch.optim.AdamW(model.parameters(), lr=1e-5)
    feed = FeedConfig()
    real = Feed(our_mixture(work), config, feed, rank=0, world_size=1, decoder=make_decoder(feed, AUGMENT, config.seed))
    length = real.batch(0).tokens_BT.shape[1]
    mock = MockFeed(config, rank=0, world_size=1, tokens=length)

    preprocessing = Preprocessing(image_size=SIZE)

    def step(batch: Any) -> None:
        optimizer.zero_grad()
        losses = objective(normalize(batch.pixels_BHWC, preprocessing), batch.tokens_BT)
        (losses.contrastive + 2 * losses.captioning).backward()
        optimizer.step()

    def seconds_of(source: Any) -> float:
        batches = source.batches(0)
        for _ in range(2):
            step(next(batches))
        began = time.perf_counter()
        for _ in range(steps):
            step(next(batches))
        seconds = time.perf_counter() - began
        batches.close()
        return seconds / steps

    found = []
    for number in range(rounds):
        first, second = (mock, real) if number % 2 == 0 else (real, mock)
        seconds = {id(source): seconds_of(source) for source in (first, second)}
        found.append((seconds[id(mock)], seconds[id(real)]))
    real.close()
    return {"step_s": found, "tokens": length, "decode_cpu_s": batch_size * decode_cpu_s(work)}


def decode_cpu_s(work: Path) -> float:
    """CPU seconds that the view of a picture takes."""
    pictures = read_pictures(work, 300)
    warm_up(pictures)
    pixels_HWC = np.empty((SIZE, SIZE, 3), np.uint8)
    began = time.thread_time()
    for picture in pictures:
        VIEW.draw(picture, pixels_HWC)
    return (time.thread_time() - began) / len(pictures)


def run_alone(name: str, *args: Any) -> Any:
    """The side's result, from a new process that has imported what it needs before it begins to count."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, name, args).result()


def _run(name: str, args: tuple[Any, ...]) -> Any:
    if not name.startswith("bare"):
        import torch

        torch.set_num_threads(1)
    if name in ("ours", "first_batches_s", "training"):
        import coca.dataset
        import coca.feed  # noqa: F401
    return globals()[name](*args)
