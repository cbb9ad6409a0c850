"""How fast a run goes and where its time stays: the timings of a row of metrics.jsonl, beside its deterministic fields.

| field                       | holds                                                                            |
| --------------------------- | -------------------------------------------------------------------------------- |
| samples_per_s               | of all workers, without the time of evaluations and of checkpoints               |
| data_wait_s, data_wait      | seconds in which the loop waited for batches, and their share of the time        |
| checkpoint_pause_s          | seconds in which saving held the loop                                            |
| flop_utilisation_spec       | FLOPs of the model on rank 0's device over what its data sheet promises, or null |
| flop_utilisation_measured   | the same over a large matrix product measured on it when training began          |
| peak_memory_gib             | of rank 0 since it started: on the GPU, else resident                            |
| goodput, lost_s             | of the run so far, `coca.goodput`                                                |
| time, wall_s                | unix seconds; seconds since the run began                                        |

FLOPs are those of `coca.cost` for the lengths, sizes and patches of the batches really seen; what activation
checkpointing or cached features compute twice is not counted twice.
"""

import functools
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from coca.config import ModelConfig
from coca.cost import TRAINING, flops
from coca.goodput import CHECKPOINT, DATA, EVALUATION, Goodput
from coca.matrix_rate import device_peak, measure_matrix_rate
from coca.train_config import TrainConfig

if TYPE_CHECKING:
    from coca.feed import Batch

_APART = (CHECKPOINT, EVALUATION)  # no part of the rate of steps


class Meter:
    """Counts on one rank from row to row; rank 0's rows are written.

    Args:
        goodput: rank 0's account of the run.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, world_size: int, goodput: Goodput | None = None
    ) -> None:
        self._config, self._device, self._goodput = config, device, goodput
        self._local_batch = config.batch_size // world_size
        self._lost_s: dict[str, float] = {}  # since the last row
        self._flops = 0
        self._samples, self._position = 0, 0
        self._since = self._started = time.perf_counter()
        self._spec_rate: float | None = None
        self._matrix_rate: float | None = None

    def begin(self, position: int) -> None:
        """Training goes on from ``position`` steps. Measures the device on rank 0."""
        if self._goodput is not None:
            self._spec_rate = device_peak(self._device, self._config.precision)
            self._matrix_rate = measure_matrix_rate(self._device, self._config.precision)
            self._goodput.begin(position)
        self._samples, self._position = position * self._config.batch_size, position
        self._since, self._lost_s, self._flops = time.perf_counter(), {}, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what waits for the next batch."""
        with self.losing(DATA):
            yield

    @contextmanager
    def losing(self, cause: str) -> Iterator[None]:
        """Around what is no step: one of `coca.goodput.LOSSES`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.lose(cause, time.perf_counter() - started)

    def lose(self, cause: str, seconds: float) -> None:
        """Count seconds that have just passed under one of `coca.goodput.LOSSES`."""
        self._lost_s[cause] = self._lost_s.get(cause, 0.0) + seconds
        if self._goodput is not None:
            self._goodput.lose(cause, seconds)

    def step(self, batch: "Batch") -> None:
        """One more step is done, on this rank's ``batch``."""
        kept = None if batch.kept_patches_BK is None else batch.kept_patches_BK.shape[1]
        tokens, size = batch.tokens_BT.shape[1], batch.pixels_BHWC.shape[1]
        self._flops += self._local_batch * sample_flops(self._config.model, tokens, size, kept)
        self._position += 1
        if self._goodput is not None:
            self._goodput.step(self._position)

    def row(self, step: int, samples: int) -> dict[str, Any]:
        """The fields of the table above, over the time since the row before.

        Args:
            step: steps done.
            samples: samples seen until then, of all workers.
        """
        now = time.perf_counter()
        elapsed_s = now - self._since
        running_s = max(elapsed_s - sum(self._lost_s.get(cause, 0.0) for cause in _APART), 1e-9)
        data_wait_s = self._lost_s.get(DATA, 0.0)
        flop_rate = self._flops / running_s
        row: dict[str, Any] = {
            "samples_per_s": (samples - self._samples) / running_s,
            "data_wait_s": data_wait_s,
            "data_wait": data_wait_s / running_s,
            "checkpoint_pause_s": self._lost_s.get(CHECKPOINT, 0.0),
            "flop_utilisation_spec": flop_rate / self._spec_rate if self._spec_rate else None,
            "flop_utilisation_measured": flop_rate / self._matrix_rate if self._matrix_rate else None,
            "peak_memory_gib": peak_memory(self._device) / 2**30,
            "time": time.time(),
            "wall_s": now - self._started,
        }
        if self._goodput is not None:
            row |= {"wall_s": self._goodput.wall_s, **self._goodput.row()}
        self._since, self._lost_s, self._flops = now, {}, 0
        self._samples, self._position = samples, step
        return row

    def close(self, *, finished: bool) -> None:
        """Training ends in order; with ``finished`` at its last step."""
        if self._goodput is not None:
            self._goodput.close(finished=finished)


@functools.lru_cache(maxsize=4096)
def sample_flops(model: ModelConfig, tokens: int, image_size: int, kept_patches: int | None = None) -> int:
    """Operations of one sample in training: forward and backward, 2 for each multiply-accumulate (`coca.cost`).

    Args:
        tokens: length that the caption is padded to, begin and end included.
        image_size: side of the picture, which need not be the config's.
        kept_patches: patches that a ViT sees of a picture; by default all.
    """
    if kept_patches is None or model.vision.kind != "vit":
        return TRAINING * _forward_flops(model, tokens, image_size)
    # In the number of patches the cost is a polynomial of degree 2: three sizes tell it for any number (Lagrange).
    patch, grids = model.vision.patch_size, (1, 2, 3)
    total = 0.0
    for grid in grids:
        others = [other**2 for other in grids if other != grid]
        share = 1.0
        for other in others:
            share *= (kept_patches - other) / (grid**2 - other)
        total += share * _forward_flops(model, tokens, grid * patch)
    # Patches are dropped after they were embedded.
    dropped = (image_size // patch) ** 2 - kept_patches
    return TRAINING * (round(total) + dropped * 2 * 3 * patch**2 * model.vision.width)


def _forward_flops(model: ModelConfig, tokens: int, image_size: int) -> int:
    vision = model.vision.model_copy(update={"image_size": image_size})
    return sum(flops(model.model_copy(update={"vision": vision}), tokens).values())


def peak_memory(device: torch.device) -> int:
    """Most bytes that this process held since it started: on the GPU, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
