"""Training speed against open_clip 3.3's CoCa: same configuration, batch, start weights and optimizer, in turns.

Two batches: captions of web length (8 to 24 tokens), which open_clip pads to its context and we to the longest, and
captions that fill the context, where nothing can be saved. The losses of every step have to agree, so the work is the
same. open_clip's head starts as uninitialised memory; both get our start weights.

With --alone NAME one of our variants runs by itself: samples a second, and the share of the matrix rate measured in the
same run that the model's own operations make up (recomputed ones are not counted).

Run: make peers, then python benchmarks/train_step.py [--batch 8] [--rounds 3]
On a GPU: ... --variant coca_ViT-L-14 --device cuda --precision bfloat16 --compiled --batch 64
          ... --alone large --device cuda --precision bfloat16 --compiled --batch 64
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peers.client import OpenClip
from torch import Tensor

from coca.cost import TRAINING, flops
from coca.model import CoCa
from coca.objective import Objective
from coca.open_clip import to_open_clip
from coca.train_config import LossConfig
from coca.variants import VARIANTS

LEARNING_RATE = 1e-5


class Ours:
    """Steps of our model and losses."""

    def __init__(self, model: CoCa, arguments: argparse.Namespace) -> None:
        self.model = model.to(arguments.device).train()
        self._objective = Objective(self.model, LossConfig(), compiled=arguments.compiled)
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        self._arguments = arguments

    def train(self, pixels: Tensor, tokens: Tensor, steps: int) -> tuple[float, list[float]]:
        """(seconds, loss of each step); tokens are cut to the batch's longest caption, as the feed gives them."""
        device = self._arguments.device
        longest = int((tokens != 0).sum(dim=1).max())
        pixels, tokens = pixels.to(device), tokens[:, :longest].to(device)
        losses: list[Tensor] = []
        started = time.perf_counter()
        for _ in range(steps):
            self._optimizer.zero_grad()
            with torch.autocast(device, torch.bfloat16, enabled=self._arguments.precision == "bfloat16"):
                contrastive, captioning = self._objective(pixels, tokens)
            total = contrastive + 2 * captioning
            total.backward()
            self._optimizer.step()
            losses.append(total.detach())
        values = [loss.item() for loss in losses]
        return time.perf_counter() - started, values


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    if arguments.alone:
        print(json.dumps(alone(arguments)))
        return
    model = CoCa(VARIANTS[arguments.variant]())
    with tempfile.TemporaryDirectory() as folder, OpenClip() as peer:
        weights = Path(folder) / "weights.safetensors"
        safetensors.torch.save_file(to_open_clip(model.state_dict(), model.config), weights)
        shared = {"weights": str(weights), "threads": arguments.threads, "device": arguments.device}
        versions = peer.ask("load", variant=arguments.variant, **shared)
        ours = Ours(model, arguments)
        for lengths in ((8, 24), (model.config.text.context_length,) * 2):
            print(json.dumps(compare(ours, peer, lengths, arguments, Path(folder)) | {"peer": versions}), flush=True)


def compare(
    ours: Ours, peer: OpenClip, lengths: tuple[int, int], arguments: argparse.Namespace, folder: Path
) -> dict[str, Any]:
    pixels, tokens = batch(ours.model, arguments.batch, lengths)
    torch.save({"pixels": pixels, "tokens": tokens}, folder / "batch.pt")
    request = {
        "batch": str(folder / "batch.pt"),
        "steps": arguments.steps,
        "precision": arguments.precision,
        "compiled": arguments.compiled,
        "rate": LEARNING_RATE,
    }
    pairs, difference = [], 0.0
    for number in range(arguments.rounds + 1):
        theirs = peer.ask("train", **request)
        seconds, losses = ours.train(pixels, tokens, arguments.steps)
        difference = max(difference, *(abs(a / b - 1) for a, b in zip(losses, theirs["losses"], strict=True)))
        if number:  # the first round warms up
            pairs.append((seconds, theirs["seconds"]))
    ratios = sorted(slow / fast for fast, slow in pairs)
    samples = arguments.batch * arguments.steps
    return {
        "benchmark": "train_step",
        "variant": arguments.variant,
        "device": device_name(arguments.device),
        "precision": arguments.precision,
        "compiled": arguments.compiled,
        "batch": arguments.batch,
        "caption_tokens": list(lengths),
        "largest_loss_difference": float(f"{difference:.1e}"),
        "ratio_median": round(statistics.median(ratios), 2),
        "ratio_min": round(ratios[0], 2),
        "ratio_max": round(ratios[-1], 2),
        "our_samples_per_s": round(samples / statistics.median(ours for ours, _ in pairs), 2),
        "their_samples_per_s": round(samples / statistics.median(theirs for _, theirs in pairs), 2),
    }


def alone(arguments: argparse.Namespace) -> dict[str, Any]:
    model = CoCa(VARIANTS[arguments.alone]())
    context_length = model.config.text.context_length
    operations = TRAINING * sum(flops(model.config).values())
    ours = Ours(model, arguments)
    pixels, tokens = batch(model, arguments.batch, (context_length, context_length))
    ours.train(pixels, tokens, 2)
    rates = []
    for _ in range(arguments.rounds):
        matrix_rate = multiply_rate(arguments)
        seconds, _ = ours.train(pixels, tokens, arguments.steps)
        samples_per_s = arguments.batch * arguments.steps / seconds
        rates.append((samples_per_s, samples_per_s * operations / matrix_rate, matrix_rate))
    samples_per_s, utilisation, matrix_rate = sorted(rates)[len(rates) // 2]
    on_gpu = arguments.device == "cuda"
    return {
        "benchmark": "train_step_alone",
        "variant": arguments.alone,
        "device": device_name(arguments.device),
        "precision": arguments.precision,
        "compiled": arguments.compiled,
        "batch": arguments.batch,
        "samples_per_s": round(samples_per_s, 2),
        "teraflops_measured_matmul": round(matrix_rate / 1e12, 3),
        "utilisation_of_measured_matmul": round(utilisation, 3),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else None,
    }


def multiply_rate(arguments: argparse.Namespace) -> float:
    """Operations a second of one large square product in the precision of the run."""
    size = 8192 if arguments.device == "cuda" else 2048
    kind = torch.bfloat16 if arguments.precision == "bfloat16" else torch.float32
    left, right = (torch.randn(size, size, device=arguments.device, dtype=kind) for _ in range(2))
    (left @ right).sum().item()
    rounds, started = 10, time.perf_counter()
    for _ in range(rounds):
        product = left @ right
    product.sum().item()
    return rounds * 2 * size**3 / (time.perf_counter() - started)


def batch(model: CoCa, size: int, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Pixels and captions of random lengths between two bounds, padded to the context."""
    generator = torch.Generator().manual_seed(size)
    text, side = model.config.text, model.config.vision.image_size
    pixels = torch.randn(size, 3, side, side, generator=generator)
    tokens = torch.randint(3, min(text.begin_id, text.end_id) if text.begin_id > 2 else text.vocab_size,
                           (size, text.context_length), generator=generator)  # fmt: skip
    tokens[:, 0] = text.begin_id
    ends = torch.randint(lengths[0], lengths[1] + 1, (size,), generator=generator) - 1
    tokens[torch.arange(size), ends] = text.end_id
    tokens[torch.arange(text.context_length) > ends[:, None]] = text.pad_id
    return pixels, tokens


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="coca_ViT-B-32", help="the model both train")
    parser.add_argument("--alone", metavar="NAME", help="one of our variants, without the peer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="of each turn")
    parser.add_argument("--rounds", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
