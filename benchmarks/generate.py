"""Greedy captions with the key-value cache against recomputing the whole prefix at every step, in turns, same weights.

Recomputing is what open_clip does up to 3.3 and on its main branch; the same model and tokens here, so that the ratio
shows the cache alone. Prints one JSON row for each batch size. Run: python benchmarks/generate.py
"""

import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from coca.config import ModelConfig, TextConfig, VisionConfig
from coca.generate import generate
from coca.model import CoCa

BEGIN, END, PAD, LENGTH, ROUNDS = 1, 2, 0, 30, 5


def main() -> None:
    torch.manual_seed(0)
    model = CoCa(
        ModelConfig(
            vision=VisionConfig(image_size=96, patch_size=16, width=256, layers=4, heads=4, mlp_width=1024),
            text=TextConfig(
                vocab_size=8192,
                context_length=LENGTH,
                width=256,
                heads=4,
                mlp_width=1024,
                unimodal_layers=4,
                multimodal_layers=4,
            ),
            embed_dim=256,
            caption_queries=36,
            pooler_heads=4,
        )
    ).eval()
    model.multimodal.head.weight.data[END] = -10 * model.multimodal.norm.weight.data  # captions run to full length
    for batch in (1, 4, 16):
        images = torch.randn(batch, 3, 96, 96)
        ours, theirs = with_cache(model, images), without_cache(model, images)  # warm-up
        same = ours.tolist() == theirs.tolist()
        pairs = [(seconds(with_cache, model, images), seconds(without_cache, model, images)) for _ in range(ROUNDS)]
        ratios = sorted(slow / fast for fast, slow in pairs)
        row = {
            "benchmark": "generate",
            "batch": batch,
            "tokens": ours.shape[1],
            "same_tokens": same,
            "ratio_median": round(statistics.median(ratios), 2),
            "ratio_min": round(ratios[0], 2),
            "ratio_max": round(ratios[-1], 2),
        }
        print(json.dumps(row))


def with_cache(model: CoCa, images: Tensor) -> Tensor:
    return generate(model, images, begin_id=BEGIN, end_id=END, pad_id=PAD).tokens_BT


@torch.inference_mode()
def without_cache(model: CoCa, images: Tensor) -> Tensor:
    _, image_tokens = model.encode_image(images)
    tokens = torch.full((len(images), 1), BEGIN)
    while tokens.shape[1] < LENGTH:
        _, hidden = model.unimodal(tokens)
        logits = model.multimodal(hidden, model.multimodal.image_keys_values(image_tokens))[:, -1]
        logits[:, [PAD, BEGIN]] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(-1)[:, None]], dim=1)
    return tokens


def seconds(function: Callable[[CoCa, Tensor], Tensor], model: CoCa, images: Tensor) -> float:
    started = time.perf_counter()
    function(model, images)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
