"""Feeding a trainer: our feed against Ray Data, webdataset and bare decoding, on the same photographs and CPUs.

10,000 photographs of 256 to 384 pixels (crops of those that scikit-image and scikit-learn ship, each its own), a random
resized crop to 224 of each, batches of 96. All sides decode and crop by the same function, each in a process of its
own, in turns. Prints one JSON row for each claim, with the bar it is held to:

  samples a second after warm-up (the first fifth), and seconds to the first batch, against
    ray.data  read_parquet, map_batches, iter_torch_batches
    webdataset  tar shards, DataLoader of torch with a worker for each CPU
    bare  the same function in a process for each CPU, from memory, pixels thrown away
  seconds to the first batch of a run that starts at sample 9,000, against one that starts at 0
  a training step of 0.3 s or more, on all CPUs, with our feed decoding beside it, against the mock feed

Run: make peers, then python benchmarks/feed.py [--samples 10000] [--rounds 2] [--json]
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peers.feed_corpus import write_dataset, write_shards
from peers.feed_sides import run_alone

ROOT = Path(__file__).parents[1]
PEER = Path(os.environ.get("IMG2DATASET_ENV", ROOT / ".venv-img2dataset"))
RESTARTS, TRAINING_ROUNDS, TRAINING_STEPS, TRAINING_BATCH = 5, 3, 8, 16


def main() -> None:
    arguments = parse_arguments()
    with contextlib.ExitStack() as stack:
        work = Path(arguments.work or stack.enter_context(tempfile.TemporaryDirectory()))
        if not (work / "shards").exists():
            make_corpus(work, arguments.samples)
        for claim in (speed_rows, restart_row, training_row):
            if not arguments.only or claim.__name__ in arguments.only:
                for row in claim(work, arguments):
                    show(row | {"samples": arguments.samples, "cpus": os.cpu_count()}, arguments.json)


def make_corpus(work: Path, samples: int) -> None:
    if not (PEER / "bin/python").exists():
        sys.exit(f"error: there is no {PEER}. Make the peer's environment with `make peers`.")
    script = ROOT / "benchmarks/peers/feed_photographs.py"
    subprocess.run([str(PEER / "bin/python"), str(script), str(work), str(samples)], check=True)
    write_dataset(work, work / "dataset")
    write_shards(work, work / "shards")


def speed_rows(work: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    packages = str(next((PEER / "lib").glob("python*/site-packages")))
    sides: dict[str, tuple[Any, ...]] = {
        "threads": ("ours", work, arguments.samples, "threads"),
        "processes": ("ours", work, arguments.samples, "processes"),
        "ray.data": ("ray_data", work, arguments.samples),
        "webdataset": ("webdataset", work, arguments.samples, packages),
        "bare": ("bare", work, arguments.samples),
    }
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            found[name].append(run_alone(*side))
    bars = {"ray.data": 1.5, "webdataset": 1.0, "bare": 0.95}
    return [speed_row(found, peer, bar) for peer, bar in bars.items()]


def speed_row(found: dict[str, list[dict[str, float]]], peer: str, bar: float) -> dict[str, Any]:
    """Ours is what a run gets by default, threads; processes stand beside."""
    row: dict[str, Any] = {"benchmark": f"feed against {peer}"}
    for name in ("threads", "processes", peer):
        for key in found[name][0]:
            row[f"{name}_{key}"] = round(statistics.median(each[key] for each in found[name]), 3)
    for name in ("threads", "processes"):
        pairs = zip(found[name], found[peer], strict=True)
        row[f"{name}_ratio"] = spread([our["samples_per_s"] / their["samples_per_s"] for our, their in pairs])
    return row | {"ratio_bar": bar}


def restart_row(work: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    late = arguments.samples * 9 // 10
    pairs = [[run_alone("first_batch_s", work, start) for start in (0, late)] for _ in range(RESTARTS)]
    return [
        {
            "benchmark": f"first batch of a run at sample {late:,} against a fresh one",
            "fresh_s": round(statistics.median(fresh for fresh, _ in pairs), 3),
            "restart_s": round(statistics.median(restart for _, restart in pairs), 3),
            "ratio": spread([restart / fresh for fresh, restart in pairs]),
            "ratio_bar": 1.2,
        }
    ]


def training_row(work: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    done = run_alone("training", work, TRAINING_STEPS, TRAINING_ROUNDS, TRAINING_BATCH)
    pairs = done["step_s"]
    return [
        {
            "benchmark": "training on the real feed against the mock feed",
            "batch_size": TRAINING_BATCH,
            "caption_tokens": done["tokens"],
            "mock_step_s": round(statistics.median(mock for mock, _ in pairs), 3),
            "real_step_s": round(statistics.median(real for _, real in pairs), 3),
            "step_bar_s": 0.3,
            "ratio": spread([mock / real for mock, real in pairs]),
            "ratio_bar": 0.93,
        }
    ]


def spread(ratios: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 3),
        "min": round(min(ratios), 3),
        "max": round(max(ratios), 3),
    }


def show(row: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(row), flush=True)
        return
    ratios = {key: value for key, value in row.items() if isinstance(value, dict)}
    print(row["benchmark"], *(f"{key} {value['median']:.2f}" for key, value in ratios.items()), sep="; ", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=2, help="of the sides that are compared by speed")
    parser.add_argument("--only", action="append", choices=["speed_rows", "restart_row", "training_row"])
    parser.add_argument("--work", help="folder that keeps the corpus (1 GB) for another run")
    parser.add_argument("--json", action="store_true", help="whole rows, one a line")
    return parser.parse_args()


if __name__ == "__main__":
    main()
