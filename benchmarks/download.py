"""Downloading and preparing against img2dataset 1.47: same links, same web, same output, in turns.

The web is our own, on loopback: 100 addresses served by two processes, JPEG files made of the photographs that
scikit-image and scikit-learn ship, every link's bytes its own. Both sides store the short side at 256 pixels, quality
95, in Parquet, and never enlarge. Ours is the command line, `coca data refresh`, with everything that it does beside
(ledger, tokens, duplicates, a published version); theirs is `img2dataset`. Three corpora:

  photographs  0.1 to 2 megapixels
  large        12 megapixels
  slow         photographs, where one host of the 100 sends two bytes a second and one never answers

Reported for each: links a second and CPU milliseconds a link, of all processes, once with everything and once steady:
what each link costs beyond a quarter of the links, downloaded just before, so that neither side's start and end count.
Beside it the bare cost of decode + resize + encode with OpenCV, measured in the same run, and the rows that differ.

Run: make peers, then python benchmarks/download.py [--corpus photographs] [--links 20000] [--rounds 3]
"""

import argparse
import io
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peers.process_tree import run
from PIL import Image

from coca.dataset import Dataset
from coca.tokenizer import train_bpe

ROOT = Path(__file__).parents[1]
PEER = Path(os.environ.get("IMG2DATASET_ENV", ROOT / ".venv-img2dataset")) / "bin"
SCRIPTS = ROOT / "benchmarks" / "peers"
SIZE, QUALITY, HOSTS = 256, 95, 100
CORPORA = {"photographs": (2000, "0.1", "2"), "large": (60, "12", "12"), "slow": (2000, "0.1", "2")}


def main() -> None:
    arguments = parse_arguments()
    if not (PEER / "img2dataset").exists():
        sys.exit(f"error: there is no {PEER}. Make the peer's environment with `make peers`.")
    with tempfile.TemporaryDirectory(dir=arguments.work) as work:
        for corpus in arguments.corpus or list(CORPORA):
            print(json.dumps(compare(corpus, arguments, Path(work))), flush=True)


def compare(corpus: str, arguments: argparse.Namespace, work: Path) -> dict[str, Any]:
    different, least, most = CORPORA[corpus]
    bodies = work / f"bodies-{least}-{most}"
    if not bodies.exists():
        peer("photographs.py", str(bodies), str(min(different, arguments.links)), least, most)
    bare_ms = json.loads(peer("bare_preparation.py", str(bodies), str(SIZE), str(QUALITY), "200"))["ms"]
    theirs, ours = [], []
    with Servers(bodies, slow=corpus == "slow") as servers:
        few, all_links = (write_links(work, servers.urls(number)) for number in (arguments.links // 4, arguments.links))
        for _ in range(arguments.rounds):
            theirs.append(measure(their_command, few, all_links, arguments))
            ours.append(measure(our_command, few, all_links, arguments))
        differences = compare_rows(their_rows(work / "their_command"), our_rows(work / "our_command"))
        differences["our_reasons"] = our_reasons(work / "our_command")
    return {
        "benchmark": "download",
        "corpus": corpus,
        "links": arguments.links,
        "cpus": os.cpu_count(),
        "bare_opencv_cpu_ms": round(bare_ms, 2),
        "ours": median(ours, bare_ms),
        "img2dataset": median(theirs, bare_ms),
        "ratios": {key: ratios(ours, theirs, key) for key in ours[0]},
        "rows": differences,
    }


Command = Callable[[Path, Path, argparse.Namespace], list[str]]


def measure(command: Command, few: Path, all_links: Path, arguments: argparse.Namespace) -> dict[str, float]:
    costs = []
    for links in (few, all_links):
        output = links.with_name(command.__name__)
        shutil.rmtree(output, ignore_errors=True)
        costs.append(run(command(links, output, arguments), links.with_name("log.txt"), environment()))
    start, whole = costs
    links_beyond = arguments.links - arguments.links // 4
    return {
        "links_per_s": arguments.links / whole.seconds,
        "steady_links_per_s": links_beyond / (whole.seconds - start.seconds),
        "cpu_ms_per_link": 1000 * whole.cpu_seconds / arguments.links,
        "steady_cpu_ms_per_link": 1000 * (whole.cpu_seconds - start.cpu_seconds) / links_beyond,
    }


def write_links(work: Path, urls: list[str]) -> Path:
    path = work / f"links-{len(urls)}.parquet"
    captions = [f"a photograph, number {number} of its kind" for number in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "caption": captions}), path)
    return path


def their_command(links: Path, output: Path, arguments: argparse.Namespace) -> list[str]:
    options = {
        "url_list": links,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "output_folder": output,
        "output_format": "parquet",
        "image_size": SIZE,
        "resize_mode": "keep_ratio",
        "resize_only_if_bigger": True,
        "encode_quality": QUALITY,
        "processes_count": arguments.processes,
        "thread_count": arguments.threads,
        "number_sample_per_shard": arguments.links_per_shard,
        "enable_wandb": False,
    }
    return [str(PEER / "img2dataset"), *(f"--{key}={value}" for key, value in options.items())]


def our_command(links: Path, output: Path, arguments: argparse.Namespace) -> list[str]:
    tokenizer = links.with_name("tokenizer.json")
    if not tokenizer.exists():
        trained = train_bpe(["a photograph, number 0123456789 of its kind"] * 10, vocab_size=300)
        tokenizer.write_text(trained.to_json(), encoding="utf-8")
    settings = [
        "fetch.allow_networks=[127.0.0.0/8]",
        f"image.size={SIZE}",
        f"image.encode_quality={QUALITY}",
        f"publish.links_per_part={arguments.links_per_shard}",
        *arguments.set,
    ]
    command = [str(Path(sys.executable).with_name("coca")), "data", "refresh", f"--links={links}", f"--to={output}"]
    return [*command, f"--tokenizer={tokenizer}", *(f"--set={setting}" for setting in settings)]


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}


def peer(script: str, *values: str) -> str:
    command = [str(PEER / "python"), str(SCRIPTS / script), *values]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment()).stdout


class Servers:
    """The web of a corpus: two processes, half of the addresses each."""

    def __init__(self, bodies: Path, *, slow: bool) -> None:
        self._bodies = bodies
        self._hosts = [f"127.0.0.{number + 2}" for number in range(HOSTS)]
        self._marks = {0: "~", 1: "!"} if slow else {}

    def __enter__(self) -> Self:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        marked = [host + self._marks.get(number, "") for number, host in enumerate(self._hosts)]
        self._processes = [self._start(marked[half::2]) for half in (0, 1)]
        return self

    def _start(self, hosts: list[str]) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPTS / "web_server.py"), str(self._bodies), str(self._port), *hosts]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            sys.exit("error: a web server did not start")
        return process

    def urls(self, number: int) -> list[str]:
        hosts = [self._hosts[link % HOSTS] for link in range(number)]
        return [f"http://{host}:{self._port}/{link}.jpg" for link, host in enumerate(hosts)]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def median(figures: list[dict[str, float]], bare_ms: float) -> dict[str, float]:
    found = {key: statistics.median(figure[key] for figure in figures) for key in figures[0]}
    found["steady_cpu_over_bare"] = found["steady_cpu_ms_per_link"] / bare_ms
    return {key: round(value, 2) for key, value in found.items()}


def ratios(ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str) -> dict[str, float]:
    """Of ours to theirs, round by round."""
    found = sorted(our[key] / their[key] for our, their in zip(ours, theirs, strict=True))
    return {"median": round(statistics.median(found), 2), "min": round(found[0], 2), "max": round(found[-1], 2)}


Row = dict[str, Any]


def their_rows(output: Path) -> dict[str, Row]:
    columns = ["url", "status", "error_message", "width", "height", "original_width", "original_height", "jpg"]
    tables = [pq.read_table(path, columns=columns) for path in sorted(output.glob("*.parquet"))]
    return {row["url"]: row | {"image": row["jpg"]} for table in tables for row in table.to_pylist()}


def our_rows(output: Path) -> dict[str, Row]:
    dataset = Dataset(str(output))
    columns = ("url", "image", "width", "height", "original_width", "original_height")
    groups = range(dataset.row_groups.num_rows)
    return {row["url"]: row for index in groups for row in dataset.read_row_group(index, columns=columns).to_pylist()}


def our_reasons(output: Path) -> dict[str, int]:
    """Why links have no selected sample, from the ledger's files: there has been one refresh."""
    tables = [pq.ParquetFile(path).read(columns=["reason"]) for path in (output / "links").rglob("*.parquet")]
    return dict(Counter(row["reason"] for table in tables for row in table.to_pylist() if row["reason"]))


def compare_rows(theirs: dict[str, Row], ours: dict[str, Row]) -> dict[str, Any]:
    """Which links only one side has, whose sizes differ, and how far pixels are apart (mean of 255, 200 samples)."""
    stored = {url: row for url, row in theirs.items() if row["status"] == "success"}
    both = sorted(stored.keys() & ours.keys())
    sizes = ("width", "height", "original_width", "original_height")
    apart = [pixel_distance(stored[url], ours[url]) for url in random.Random(0).sample(both, min(200, len(both)))]
    return {
        "both": len(both),
        "only_img2dataset": len(stored.keys() - ours.keys()),
        "only_ours": len(ours.keys() - stored.keys()),
        "their_errors": dict(Counter(row["error_message"] for row in theirs.values() if row["status"] != "success")),
        "sizes_differ": sum(any(stored[url][key] != ours[url][key] for key in sizes) for url in both),
        "mean_pixel_distance": round(statistics.mean(apart), 2) if apart else None,
        "largest_mean_pixel_distance": round(max(apart), 2) if apart else None,
    }


def pixel_distance(left: Row, right: Row) -> float:
    pixels = [np.asarray(Image.open(io.BytesIO(row["image"])).convert("RGB"), dtype=float) for row in (left, right)]
    return float(np.abs(pixels[0] - pixels[1]).mean()) if pixels[0].shape == pixels[1].shape else 255.0


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", action="append", choices=list(CORPORA), help="by default all; may be repeated")
    parser.add_argument("--links", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--links-per-shard", type=int, default=2048, help="of theirs, and links of a part of ours")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="of img2dataset")
    parser.add_argument("--threads", type=int, default=64, help="of each process of img2dataset")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="another setting of ours")
    parser.add_argument("--work", help="folder for the corpora and what is downloaded; some gigabytes")
    return parser.parse_args()


if __name__ == "__main__":
    main()
