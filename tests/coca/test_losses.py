"""The losses: golden values, a naive reference, and the global batch over several processes."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from coca.losses import captioning_loss, contrastive_loss


def unit(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def test_identical_embeddings_give_ln_batch() -> None:
    features = unit(1, 8).expand(16, 8)
    loss = contrastive_loss(features, features, torch.tensor(10.0, dtype=torch.float64))
    assert loss.item() == pytest.approx(math.log(16), rel=1e-12)


def test_uniform_logits_give_ln_vocabulary() -> None:
    tokens = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0]])
    loss = captioning_loss(torch.zeros(2, 3, 50, dtype=torch.float64), tokens, pad_id=0)
    assert loss.item() == pytest.approx(math.log(50), rel=1e-12)


def test_contrastive_loss_equals_a_naive_loop() -> None:
    images, texts, scale = unit(6, 4, seed=1), unit(6, 4, seed=2), 7.5
    total = 0.0
    for i in range(6):
        row = [math.exp(scale * float(images[i] @ texts[j])) for j in range(6)]
        column = [math.exp(scale * float(images[j] @ texts[i])) for j in range(6)]
        total -= math.log(row[i] / sum(row)) + math.log(column[i] / sum(column))
    assert contrastive_loss(images, texts, torch.tensor(scale)).item() == pytest.approx(total / 12, rel=1e-12)


def test_captioning_loss_counts_real_tokens_only() -> None:
    logits = torch.randn(2, 3, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[1, 5, 6, 2], [1, 2, 0, 0]])
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 0, 5] + log_p[0, 1, 6] + log_p[0, 2, 2] + log_p[1, 0, 2]) / 4
    assert captioning_loss(logits, tokens, pad_id=0).item() == pytest.approx(expected.item(), rel=1e-12)


RANK_SCRIPT = """
import json, sys
import torch, torch.distributed as dist
from coca.losses import captioning_loss, contrastive_loss
data, out = torch.load(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
weights = {k: data[k].clone().requires_grad_() for k in ("image_weight", "text_weight", "head")}
scale = data["scale"].clone().requires_grad_()
share = lambda x: x.chunk(world)[rank]
images = torch.nn.functional.normalize(share(data["images"]) @ weights["image_weight"], dim=-1)
texts = torch.nn.functional.normalize(share(data["texts"]) @ weights["text_weight"], dim=-1)
logits = share(data["hidden"]) @ weights["head"]
contrastive = contrastive_loss(images, texts, scale.exp())
captioning = captioning_loss(logits, share(data["tokens"]), 0)
(contrastive + 2 * captioning).backward()
results = [contrastive.detach(), captioning.detach(), *(w.grad for w in weights.values()), scale.grad]
for value in results:
    dist.all_reduce(value)
    value /= world
if rank == 0:
    torch.save(results, out)
dist.destroy_process_group()
"""


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_give_the_losses_and_gradients_of_one_process(tmp_path: Path, world: int) -> None:
    """Bites when the contrastive loss is restricted to the local batch, or padding is averaged rank by rank."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens = torch.tensor([[1, 5, 6, 2], [1, 2, 0, 0], [1, 3, 2, 0], [1, 4, 4, 2]] * 2)
    data = {
        "images": normal(8, 6),
        "texts": normal(8, 6),
        "hidden": normal(8, 3, 5),
        "tokens": tokens,
        "image_weight": normal(6, 4),
        "text_weight": normal(6, 4),
        "head": normal(5, 7),
        "scale": torch.tensor(1.5, dtype=torch.float64),
    }
    torch.save(data, tmp_path / "data.pt")
    one, many = (_run_ranks(tmp_path, count) for count in (1, world))
    for single, several in zip(one, many, strict=True):
        torch.testing.assert_close(several, single, rtol=1e-10, atol=1e-12)


def _run_ranks(folder: Path, world: int) -> list[Tensor]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    out = folder / f"results-{world}.pt"
    command = [sys.executable, "-c", RANK_SCRIPT, str(folder / "data.pt"), str(out)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world, json.dumps(errors)
    results: list[Tensor] = torch.load(out)
    return results
