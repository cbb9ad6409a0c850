"""How fast a run should go: operations of its samples, over what its devices are assumed to reach."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from coca.feed import patches_kept
from coca.matrix_rate import device_peak, measure_matrix_rate, spec_peak
from coca.meter import sample_flops
from coca.train_config import TrainConfig
from jobs.config import WorkersConfig

UTILISATION = 0.4  # of a data sheet's peak, or of a measured matrix product: what a run is assumed to reach
_KIND = "accelerator_type:"


class Stretch(NamedTuple):
    """Steps whose pictures cost the same."""

    start: int
    steps: int
    image_size: int
    patch_dropout: float

    def steps_from(self, step: int) -> int:
        """How many of its steps a run still has to do that has done ``step``."""
        return max(self.start + self.steps - max(self.start, step), 0)


def stretches(config: TrainConfig) -> Iterator[Stretch]:
    """The run in order, cut where the picture size or the patch dropout changes."""
    unmasked = config.steps - round(config.augment.unmasked_fraction * config.steps)
    changes = {0, unmasked, *(phase.from_step for phase in config.resolutions)}
    starts = sorted(start for start in changes if start < config.steps)
    begun: Stretch | None = None
    for start, end in zip(starts, [*starts[1:], config.steps], strict=True):
        size, dropout = config.image_size(start), config.patch_dropout(start)
        if begun is not None and (begun.image_size, begun.patch_dropout) == (size, dropout):
            begun = begun._replace(steps=end - begun.start)
            continue
        if begun is not None:
            yield begun
        begun = Stretch(start, end - start, size, dropout)
    if begun is not None:
        yield begun


def stretch_flops(config: TrainConfig, part: Stretch) -> int:
    """Operations of one sample of a stretch, its caption as long as the context."""
    kept = patches_kept(config, part.start)
    return sample_flops(
        config.model, config.model.text.context_length, part.image_size, None if kept is None else kept[1]
    )


def device_rate(
    workers: WorkersConfig, precision: str, nodes: Sequence[Mapping[str, float]] | None
) -> tuple[float | None, str]:
    """(operations a second of one worker's device, where the number is from); None where nothing tells them.

    Args:
        nodes: each node's resources, as Ray names them; None where no cluster is known.
    """
    if workers.use_gpu is False or (workers.use_gpu is None and not torch.cuda.is_available()):
        before = torch.get_num_threads()
        torch.set_num_threads(workers.threads)
        try:
            rate = measure_matrix_rate(torch.device("cpu"), precision)
        finally:
            torch.set_num_threads(before)
        return rate, f"a matrix product measured on this machine with {workers.threads} threads"
    kinds = sorted({name.removeprefix(_KIND) for node in nodes or () for name in node if name.startswith(_KIND)})
    peaks = {kind: spec_peak(kind, precision) for kind in kinds}
    known = {kind: peak for kind, peak in peaks.items() if peak is not None}
    if known:
        slowest = min(known, key=lambda kind: known[kind])
        return known[slowest], f"the data sheet of {slowest}"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        peak = device_peak(device, precision)
        name = torch.cuda.get_device_name(device)
        if peak is not None:
            return peak, f"the data sheet of {name}"
        return measure_matrix_rate(device, precision), f"a matrix product measured on {name}"
    return None, f"the cluster's GPUs ({', '.join(kinds) or 'of no known kind'}) are not in coca/matrix_rate.py"
