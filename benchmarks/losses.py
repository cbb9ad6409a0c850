"""What the losses of coca/losses.py take in memory and time, against losses that hold the whole matrix.

Prints one JSON row for each claim, with the bar it is held to. Memory is the peak during one loss with its gradients,
less what was held before: it counts the gradients. Each peak is taken in a process of its own. On a machine with CUDA
everything runs there, elsewhere on the CPU (Linux only: peaks come from /proc).
Where others use the machine too, OMP_NUM_THREADS=1 keeps the times steady. Run: python benchmarks/losses.py
"""

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from coca.losses import captioning_loss, contrastive_loss, fused_captioning_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH, VOCABULARY, WIDTH, EMBED, ROUNDS = 64, 64_000, 768, 512, 5


def main() -> None:
    threads = {"device": DEVICE, "threads": torch.get_num_threads()}
    for row in (captioning_row, large_captioning_row, contrastive_row, gradients_row):
        print(json.dumps(row() | threads), flush=True)


def captioning_row() -> dict[str, object]:
    plain, fused = (alone(peak_mb, captioning, kind, 64, VOCABULARY) for kind in ("plain", "fused"))
    pairs = alone(seconds_in_turns)
    ratios = sorted(fused_s / plain_s for plain_s, fused_s in pairs)
    return {
        "benchmark": "captioning, fused against plain, 64 x 64 tokens",
        "plain_mb": round(plain),
        "fused_mb": round(fused),
        "memory_ratio": round(fused / plain, 3),
        "memory_ratio_bar": 0.1,
        "plain_s": round(statistics.median(plain_s for plain_s, _ in pairs), 2),
        "fused_s": round(statistics.median(fused_s for _, fused_s in pairs), 2),
        "time_ratio_median": round(statistics.median(ratios), 3),
        "time_ratio_min": round(ratios[0], 3),
        "time_ratio_max": round(ratios[-1], 3),
        "time_ratio_bar": 1.0,
    }


def large_captioning_row() -> dict[str, object]:
    peak = alone(peak_mb, captioning, "fused", 512, VOCABULARY)
    return {"benchmark": "captioning, fused, 512 x 64 tokens", "fused_mb": round(peak), "bar_mb": 2000}


def contrastive_row() -> dict[str, object]:
    peak = alone(peak_mb, contrastive, "tiled", 65_536)
    return {"benchmark": "contrastive, batch 65,536", "tiled_mb": round(peak), "bar_mb": 1000}


def gradients_row() -> dict[str, object]:
    """Largest difference from the dense loss's gradients in float64, over the largest entry of that gradient."""
    exact = contrastive_gradients("dense", torch.float64)
    return {
        "benchmark": "contrastive gradients, batch 4,096",
        "tiled_float64_error": largest_error(contrastive_gradients("tiled", torch.float64), exact),
        "bar": 1e-6,
        "tiled_float32_error": largest_error(contrastive_gradients("tiled", torch.float32), exact),
        "dense_float32_error": largest_error(contrastive_gradients("dense", torch.float32), exact),
    }


def captioning(kind: str, rows: int, vocabulary: int) -> Callable[[], None]:
    """One loss with its gradients, at ``rows`` captions without padding."""
    torch.manual_seed(0)
    hidden_NTD = torch.randn(rows, LENGTH, WIDTH, device=DEVICE).requires_grad_()
    head_VD = (torch.randn(vocabulary, WIDTH, device=DEVICE) * WIDTH**-0.5).requires_grad_()
    tokens_NT = torch.randint(1, vocabulary, (rows, LENGTH + 1), device=DEVICE)

    def step() -> None:
        hidden_NTD.grad = head_VD.grad = None
        if kind == "fused":
            fused_captioning_loss(hidden_NTD, head_VD, tokens_NT, 0).backward()
        else:
            captioning_loss(hidden_NTD @ head_VD.T, tokens_NT, 0).backward()

    return step


def contrastive(kind: str, rows: int) -> Callable[[], None]:
    inputs, loss = contrastive_inputs(rows, torch.float32), CONTRASTIVE[kind]
    return lambda: loss(*inputs).backward()


def contrastive_inputs(rows: int, dtype: torch.dtype) -> list[Tensor]:
    """Pairs that are alike, at the sharpest temperature: most of the batch is told apart."""
    torch.manual_seed(0)
    images, noise = (F.normalize(torch.randn(rows, EMBED, device=DEVICE), dim=1) for _ in range(2))
    texts = F.normalize(images + 3 * noise, dim=1)
    return [value.to(dtype).requires_grad_() for value in (images, texts, torch.tensor(100.0, device=DEVICE))]


def dense_contrastive(images_NE: Tensor, texts_NE: Tensor, scale: Tensor) -> Tensor:
    logits_NN, target_N = scale * images_NE @ texts_NE.T, torch.arange(len(images_NE), device=DEVICE)
    return (F.cross_entropy(logits_NN, target_N) + F.cross_entropy(logits_NN.T, target_N)) / 2


CONTRASTIVE: dict[str, Callable[..., Tensor]] = {"dense": dense_contrastive, "tiled": contrastive_loss}


def contrastive_gradients(kind: str, dtype: torch.dtype) -> list[Tensor]:
    inputs = contrastive_inputs(4096, dtype)
    return list(torch.autograd.grad(CONTRASTIVE[kind](*inputs), inputs))


def largest_error(gradients: list[Tensor], exact: list[Tensor]) -> float:
    pairs = zip(gradients, exact, strict=True)
    return float(f"{max(float((ours - right).abs().max() / right.abs().max()) for ours, right in pairs):.2g}")


def alone(function: Callable[..., Any], *args: object) -> Any:
    """The function's result, from a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_mb(case: Callable[..., Callable[[], None]], kind: str, *sizes: int) -> float:
    """The most memory held during the step, less what was held before, in 10^6 bytes."""
    case(kind, *(2 for _ in sizes))()  # thread pools and libraries are there before we look
    step = case(kind, *sizes)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to what is held now
    before = resident_kb("VmRSS")
    step()
    return (resident_kb("VmHWM") - before) * 1024 / 1e6


def resident_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def seconds_in_turns() -> list[tuple[float, float]]:
    plain, fused = (captioning(kind, 64, VOCABULARY) for kind in ("plain", "fused"))
    return [(seconds(plain), seconds(fused)) for _ in range(ROUNDS + 1)][1:]


def seconds(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
