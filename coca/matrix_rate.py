"""How many operations a second a device could do: by its data sheet, and by a matrix product measured on it."""

import functools
import re
import time

import torch

TIME_S = {"cuda": 0.3, "cpu": 0.1}  # how long a rate is measured

# Dense peaks in 1e12 operations a second, from NVIDIA's data sheets; those print twice as much for bfloat16 and TF32
# where it says "with sparsity". The longer name stands first.
# name in torch.cuda.get_device_name(): (bfloat16, TF32, float32)
_PEAKS: tuple[tuple[str, tuple[float | None, float | None, float]], ...] = (
    ("B200", (2250, 1125, 75)),
    ("GH200", (990, 495, 67)),
    ("H200 NVL", (836, 418, 60)),
    ("H200", (989, 495, 67)),
    ("H100 NVL", (836, 418, 60)),
    ("H100 PCIe", (756, 378, 51)),
    ("H100", (989, 495, 67)),
    ("A100", (312, 156, 19.5)),
    ("A10G", (70, 35, 31.5)),
    ("A10", (125, 62.5, 31.2)),
    ("L40S", (362, 183, 91.6)),
    ("L40", (181, 90.5, 90.5)),
    ("L4", (121, 60, 30.3)),
    ("V100", (None, None, 15.7)),
    ("T4", (None, None, 8.1)),
)


def spec_peak(device_name: str, precision: str, *, tf32: bool = False) -> float | None:
    """Operations a second that a GPU's data sheet promises for dense products; None where none is known, as for CPUs.

    Args:
        device_name: as torch gives it, or Ray's accelerator type.
        precision: float32 or bfloat16.
        tf32: whether float32 products may run in TF32.
    """
    for name, (bfloat16, tf32_peak, float32) in _PEAKS:
        if re.search(rf"(?<![A-Z0-9]){name.replace(' ', '[ -]')}(?![A-Z0-9])", device_name, re.IGNORECASE):
            peak = bfloat16 if precision == "bfloat16" else (tf32_peak if tf32 else None) or float32
            return None if peak is None else peak * 1e12
    return None


def device_peak(device: torch.device, precision: str) -> float | None:
    """``spec_peak`` of a device of this process."""
    if device.type != "cuda":
        return None
    tf32 = torch.get_float32_matmul_precision() != "highest"
    return spec_peak(torch.cuda.get_device_name(device), precision, tf32=tf32)


@functools.lru_cache
def measure_matrix_rate(device: torch.device, precision: str) -> float:
    """Operations a second of a large square product in ``precision``, measured for ``TIME_S`` once in a process.

    Draws nothing from torch's own random state.
    """
    on_gpu = device.type == "cuda"
    size = 8192 if on_gpu else 512
    kind = torch.bfloat16 if precision == "bfloat16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, device=device, generator=generator).to(kind) for _ in range(2))

    def multiply(times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            product = left @ right
        product[0, 0].item()
        return time.perf_counter() - started

    once_s = min(multiply(1) for _ in range(3))  # the first one warms up
    times = max(1, round(TIME_S["cuda" if on_gpu else "cpu"] / once_s))
    return times * 2 * size**3 / multiply(times)
