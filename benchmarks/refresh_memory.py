"""Peak memory of a whole refresh against its size: the sum of PSS over the driver, Ray and all workers.

The web is our own, on loopback: pictures of 256 pixels, about 25 KB each, every link's bytes its own. The object store
has the same size in both runs. Few links and many take the same memory where nothing grows with the table.

Run: python benchmarks/refresh_memory.py [--few 20000] [--many 100000]
"""

import argparse
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peers.process_tree import Cost, run
from PIL import Image

from coca.tokenizer import train_bpe

SERVER = Path(__file__).parent / "peers" / "web_server.py"
HOSTS, PICTURES = 50, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=20_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--set", action="append", default=[], metavar="A.B=VALUE", help="of the refresh, repeatable")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_pictures(folder)
        tokenizer = train_bpe(["a picture, number 0123456789 of its kind"] * 10, vocab_size=300)
        (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        costs = {links: refresh(folder, links, options.set) for links in (options.few, options.many)}
    few, many = (costs[links].peak_pss_mb for links in (options.few, options.many))
    row = {
        "benchmark": "refresh_memory",
        "peak_pss_mb": {str(links): round(cost.peak_pss_mb) for links, cost in costs.items()},
        "ratio": round(many / few, 3),
        "seconds": {str(links): round(cost.seconds, 1) for links, cost in costs.items()},
    }
    print(json.dumps(row))


def make_pictures(folder: Path) -> None:
    """The layout of peers/web_server.py: files end to end, and [offset, bytes, width, height] of each."""
    index, data = [], bytearray()
    for number in range(PICTURES):
        coarse = np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(coarse).resize((256, 256), Image.Resampling.BICUBIC).save(buffer, "jpeg", quality=92)
        index.append([len(data), buffer.tell(), 256, 256])
        data += buffer.getvalue()
    (folder / "bodies.bin").write_bytes(data)
    (folder / "bodies.json").write_text(json.dumps(index))


def refresh(folder: Path, links: int, settings: list[str]) -> Cost:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hosts = [f"127.0.0.{number + 2}" for number in range(HOSTS)]
    server = subprocess.Popen(
        [sys.executable, str(SERVER), str(folder), str(port), *hosts], stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        server.stdout.readline()
        table = {
            "url": [f"http://{hosts[link % HOSTS]}:{port}/{link}.jpg" for link in range(links)],
            "caption": [f"a picture, number {link} of its kind" for link in range(links)],
        }
        pq.write_table(pa.table(table), folder / "links.parquet")
        shutil.rmtree(folder / "out", ignore_errors=True)
        command = [str(Path(sys.executable).with_name("coca")), "data", "refresh"]
        command += [f"--links={folder}/links.parquet", f"--to={folder}/out", f"--tokenizer={folder}/tokenizer.json"]
        wanted = ["fetch.allow_networks=[127.0.0.0/8]", "fetch.requests_per_second_per_domain=1000", *settings]
        return run([*command, *(f"--set={each}" for each in wanted)], folder / "log.txt", os.environ, memory=True)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
