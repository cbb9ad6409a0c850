"""Feeding a trainer: our feed against Ray Data, webdataset and bare decoding, on the same photographs and CPUs.

10,000 photographs of 256 to 384 pixels (crops of those that scikit-image and scikit-learn ship, each its own), a random
resized crop to 224 of each, batches of 96. All sides decode and crop by the same function, each in a process of its
own, in turns, every second round in reverse order. Prints one JSON row for each claim as soon as it is known, with the
bar it is held to:

  samples a second after warm-up (the first fifth), and seconds to the first batch, against
    bare  the same function alone, of half the pictures, from memory, pixels thrown away: in threads or in processes,
        whichever is faster
    ray.data  read_parquet, map_batches, iter_torch_batches
    webdataset  tar shards, DataLoader of torch with a worker for each CPU
  seconds to the first batch of a run that starts at nine tenths of the samples, against one that starts at 0
  a training step of 0.3 s or more, on all CPUs, with our feed decoding beside it, against the mock feed; and the share
  of those CPUs that decoding takes

Run: make peers, then python benchmarks/feed.py [--samples 10000] [--rounds 2]
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peers.feed_corpus import write_dataset, write_shards
from peers.feed_sides import run_alone

from coca.cpus import usable_cpus

ROOT = Path(__file__).parents[1]
PEER = Path(os.environ.get("IMG2DATASET_ENV", ROOT / ".venv-img2dataset"))
RESTARTS, TRAINING_ROUNDS, TRAINING_STEPS, TRAINING_BATCH = 5, 8, 8, 16


def main() -> None:
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        work = Path(arguments.work or stack.enter_context(tempfile.TemporaryDirectory()))
        if not (work / "shards").exists():
            make_corpus(work, arguments.samples)
        for claim in (speed_rows, restart_row, training_row):
            if not arguments.only or claim.__name__ in arguments.only:
                for row in claim(work, arguments):
                    stamp = {"samples": arguments.samples, "cpus": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
                    print(json.dumps(row | stamp), flush=True)


def make_corpus(work: Path, samples: int) -> None:
    if not (PEER / "bin/python").exists():
        sys.exit(f"error: there is no {PEER}. Make the peer's environment with `make peers`.")
    script = ROOT / "benchmarks/peers/feed_photographs.py"
    subprocess.run([str(PEER / "bin/python"), str(script), str(work), str(samples)], check=True)
    write_dataset(work, work / "dataset")
    write_shards(work, work / "shards")


def speed_rows(work: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for a peer is known when it has run in each round, and ours have."""
    packages = str(next((PEER / "lib").glob("python*/site-packages")))
    # What is compared stands close together: a shared machine does not stay as fast for a whole round.
    sides: dict[str, tuple[Any, ...]] = {
        "threads": ("ours", work, arguments.samples, "threads"),
        "bare_threads": ("bare_threads", work, arguments.samples // 2),
        "bare_processes": ("bare_processes", work, arguments.samples // 2),
        "processes": ("ours", work, arguments.samples, "processes"),
        "ray.data": ("ray_data", work, arguments.samples),
        "webdataset": ("webdataset", work, arguments.samples, packages),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    waiting: dict[str, tuple[tuple[str, ...], float]] = {
        "bare": (("bare_threads", "bare_processes"), 0.95),
        "ray.data": (("ray.data",), 1.5),
        "webdataset": (("webdataset",), 1.0),
    }
    for number in range(arguments.rounds):
        for name in list(sides) if number % 2 == 0 else reversed(sides):
            began = time.monotonic()
            found[name].append(run_alone(*sides[name]))
            rate = found[name][-1]["samples_per_s"]
            print(f"{name}: {rate:.0f} samples/s, {time.monotonic() - began:.0f} s in all", file=sys.stderr, flush=True)
            ready = {each for each, timings in found.items() if len(timings) == arguments.rounds}
            for peer, (forms, bar) in list(waiting.items()):
                if ready.issuperset(("processes", "threads", *forms)):
                    del waiting[peer]
                    yield speed_row(found, peer, forms, bar)


def speed_row(
    found: dict[str, list[dict[str, float]]], peer: str, forms: tuple[str, ...], bar: float
) -> dict[str, Any]:
    """Ours is what a run gets by default, processes; threads stand beside. Of a peer's forms the fastest counts."""
    fastest = max(forms, key=lambda form: statistics.median(each["samples_per_s"] for each in found[form]))
    row: dict[str, Any] = {"benchmark": f"feed against {peer}", "against": fastest}
    for name in ("processes", "threads", *forms):
        for key in found[name][0]:
            row[f"{name}_{key}"] = round(statistics.median(each[key] for each in found[name]), 3)
    for name in ("processes", "threads"):
        pairs = zip(found[name], found[fastest], strict=True)
        row[f"{name}_ratio"] = spread([our["samples_per_s"] / their["samples_per_s"] for our, their in pairs])
    return row | {"ratio_bar": bar}


def restart_row(work: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    late = arguments.samples * 9 // 10
    starts = ([0, late, late, 0] * RESTARTS)[: 2 * RESTARTS]  # pairs, every second one in reverse order
    seconds = run_alone("first_batches_s", work, starts)
    pairs = []
    for first in range(0, len(starts), 2):
        pair = dict(zip(starts[first : first + 2], seconds[first : first + 2], strict=True))
        pairs.append((pair[0], pair[late]))
    yield {
        "benchmark": f"first batch of a run at sample {late:,} against a fresh one",
        "fresh_s": round(statistics.median(fresh for fresh, _ in pairs), 3),
        "restart_s": round(statistics.median(restart for _, restart in pairs), 3),
        "ratio": spread([restart / fresh for fresh, restart in pairs]),
        "ratio_bar": 1.2,
    }


def training_row(work: Path, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    done = run_alone("training", work, TRAINING_STEPS, TRAINING_ROUNDS, TRAINING_BATCH)
    pairs = done["step_s"]
    mock_s = statistics.median(mock for mock, _ in pairs)
    yield {
        "benchmark": "training on the real feed against the mock feed",
        "batch_size": TRAINING_BATCH,
        "caption_tokens": done["tokens"],
        "mock_step_s": round(mock_s, 3),
        "real_step_s": round(statistics.median(real for _, real in pairs), 3),
        "step_bar_s": 0.3,
        "decode_cpu_s_per_step": round(done["decode_cpu_s"], 4),
        "decode_share_of_cpus": round(done["decode_cpu_s"] / (mock_s * usable_cpus()), 4),
        "ratio": spread([mock / real for mock, real in pairs]),
        "ratio_bar": 0.93,
    }


def spread(ratios: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=2, help="of the sides that are compared by speed")
    parser.add_argument("--only", action="append", choices=["speed_rows", "restart_row", "training_row"])
    parser.add_argument("--work", help="folder that keeps the corpus (1 GB) for another run")
    return parser.parse_args()


if __name__ == "__main__":
    main()
