"""The learning-rate schedule: a factor on the peak rate."""

import math

from coca.train_config import OptimizerConfig


def schedule(step: int, steps: int, config: OptimizerConfig) -> float:
    """Factor on the peak rate at ``step``, counted from 0, of ``steps``.

    Up linearly over the warm-up, then down to 0 at the end: linearly, along half a cosine (Loshchilov and Hutter 2017,
    arXiv 1608.03983), or not before the last ``decay_fraction`` of the steps and then linearly (warm-up-stable-decay:
    Hu et al. 2024, arXiv 2404.06395; the linear fall: Hägele et al. 2024, arXiv 2405.18392).
    """
    warmup = round(config.warmup_fraction * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = warmup
    if config.schedule == "warmup_stable_decay":
        start = max(warmup, steps - round(config.decay_fraction * steps))
    progress = max(0, step - start) / max(1, steps - start)
    return (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
