"""Captions a second against open_clip 3.3, same weights, same images, in turns: greedy and beam search.

open_clip recomputes the whole prefix at every token, and for beams encodes each image once a beam. Both give 30 tokens:
the weights push the end token's logits down, so that no caption ends early. Greedy tokens have to be the same. Prints
one JSON row for each setting.

Ours keeps its weights packed on a CPU, as the service does (``coca.packed``); packing them is not timed, as loading is
not. ``--unpacked`` leaves that to each call.

Run: make peers, then python benchmarks/generate.py [--rounds 3] [--batches 1,4,16] [--searches greedy,beams]
On a GPU: ... --device cuda
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peers.client import OpenClip

from coca.generate import generate
from coca.model import CoCa
from coca.open_clip import to_open_clip
from coca.packed import packed
from coca.variants import VARIANTS

LENGTH = 30
GREEDY = {"generation_type": "top_k", "top_k": 1, "min_seq_len": 1, "seq_len": LENGTH}
BEAMS = {"generation_type": "beam_search", "num_beams": 6, "num_beam_groups": 3, "seq_len": LENGTH}


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    model = sane_model(arguments.variant).to(arguments.device)
    with tempfile.TemporaryDirectory() as folder, OpenClip() as peer:
        weights = Path(folder) / "weights.safetensors"
        safetensors.torch.save_file(to_open_clip(model.state_dict(), model.config), weights)
        peer_versions = peer.ask(
            "load",
            weights=str(weights),
            variant=arguments.variant,
            threads=arguments.threads,
            device=arguments.device,
        )
        with nullcontext() if arguments.unpacked else packed(model):
            for search in arguments.searches:
                for batch in arguments.batches:
                    row = compare(model, peer, search, batch, arguments, Path(folder))
                    print(json.dumps(row | {"peer": peer_versions}), flush=True)


def compare(
    model: CoCa, peer: OpenClip, search: str, batch: int, arguments: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    size = model.config.vision.image_size
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))
    torch.save(images, folder / "images.pt")
    images = images.to(arguments.device)
    theirs_options = GREEDY if search == "greedy" else BEAMS
    ours_options = {} if search == "greedy" else {"beams": 6, "beam_groups": 3}
    ours, theirs, same = [], [], True
    for number in range(arguments.rounds + 1):
        found = peer.ask("generate", images=str(folder / "images.pt"), options=theirs_options)
        seconds, tokens = timed(model, images, ours_options)
        if search == "greedy":
            same = same and tokens == found["tokens"]
        if number:  # the first round warms up
            ours.append(seconds)
            theirs.append(found["seconds"])
    ratios = sorted(slow / fast for slow, fast in zip(theirs, ours, strict=True))
    return {
        "benchmark": "generate",
        "variant": arguments.variant,
        "device": arguments.device,
        "search": search,
        "batch": batch,
        "tokens": LENGTH,
        "packed": not arguments.unpacked,
        "same_tokens": same if search == "greedy" else None,
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_min": round(ratios[0], 2),
        "ratio_max": round(ratios[-1], 2),
        "our_captions_per_s": round(batch / statistics.median(ours), 2),
        "their_captions_per_s": round(batch / statistics.median(theirs), 2),
    }


def sane_model(variant: str) -> CoCa:
    """Our start weights: open_clip leaves its head as uninitialised memory."""
    torch.manual_seed(0)
    model = CoCa(VARIANTS[variant]()).eval()
    text = model.config.text
    # Whatever is written, neither the end nor padding comes out on top.
    with torch.no_grad():
        model.multimodal.norm.bias.fill_(0.5)
        model.head_VD[[text.end_id, text.pad_id]] = -1.0
    return model


def timed(model: CoCa, images: torch.Tensor, options: dict[str, Any]) -> tuple[float, list[list[int]]]:
    started = time.perf_counter()
    generation = generate(model, images, max_length=LENGTH, force_end=True, **options)
    tokens: list[list[int]] = generation.tokens_BT.tolist()
    return time.perf_counter() - started, tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="coca_ViT-B-32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[1, 4, 16])
    parser.add_argument("--searches", type=lambda text: text.split(","), default=["greedy", "beams"])
    parser.add_argument("--unpacked", action="store_true", help="pack within each call, not beforehand")
    return parser.parse_args()


if __name__ == "__main__":
    main()
