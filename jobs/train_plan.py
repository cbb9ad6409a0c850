"""`coca train --dry-run`: what a run will take, from its config and its data, before anything is started."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import torch

from coca.cost import meta_model, parameters
from coca.feed import patches_kept
from coca.matrix_rate import device_peak, measure_matrix_rate, spec_peak
from coca.memory import memory
from coca.meter import sample_flops
from coca.optim import Optimizer
from coca.order import deal_lanes
from coca.parallel import check_shards
from coca.progress import format_duration
from coca.same_run import fit_to_tokenizer
from coca.train_config import TrainConfig
from jobs.attempt import resources_per_worker
from jobs.cluster import ClusterInfo
from jobs.config import TrainRunConfig, WorkersConfig
from jobs.data_report_figures import bytes_told
from jobs.trackers import check_trackers

if TYPE_CHECKING:
    from coca.mixture import Mixture

UTILISATION = 0.4  # of a data sheet's peak, or of a measured matrix product: what a run is assumed to reach


class Stretch(NamedTuple):
    """Steps whose pictures cost the same."""

    start: int
    steps: int
    image_size: int
    patch_dropout: float


def plan(
    config: TrainRunConfig, mixture: "Mixture", cluster: ClusterInfo | Mapping[str, float] | None
) -> dict[str, Any]:
    """What a run will take: plain values, sizes in bytes, times in hours.

    Memory is that of the fullest worker without what operations need for themselves, at captions of the whole context.
    FLOPs are counted so too, so hours are rather too many than too few.

    Args:
        cluster: a connection, or what ``ray.cluster_resources()`` gives; None where no cluster is known.

    Raises:
        BadInput: a tracker's package is missing, shards that do not fit the workers, a rule that matches nothing.
    """
    check_trackers(config.trackers)
    resources = _resources(cluster)
    config = config.model_copy(update={"workers": _decided(config.workers, resources)})
    train = fit_to_tokenizer(config.train, mixture.tokenizer)
    check_shards(train.parallel, config.workers.count)
    samples = train.steps * train.batch_size
    flops = sum(part.steps * train.batch_size * _flops(train, part) for part in stretches(train))
    state = _state_bytes(train)
    return {
        "run": config.out,
        "steps": train.steps,
        "batch_size": train.batch_size,
        "samples": samples,
        "parameters": sum(parameters(train.model).values()),
        "parameters_by_part": {part: count for part, count in parameters(train.model).items() if count},
        "stretches": [{**part._asdict(), "flops_per_sample": _flops(train, part)} for part in stretches(train)],
        "flops": flops,
        **_hours(config, train, flops, resources),
        "memory_per_worker": _memory(config, train, state),
        "ray": _ray(config, resources),
        "checkpoint_bytes": 2 * state["weights"] + state["optimizer"] + state["ema"],
        "checkpoints_kept": train.keep_checkpoints + (train.keep_best is not None),
        "learning_rate": _learning_rate(train),
        "datasets": _datasets(mixture, train, samples),
    }


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


def _flops(config: TrainConfig, part: Stretch) -> int:
    kept = patches_kept(config, part.start)
    return sample_flops(
        config.model, config.model.text.context_length, part.image_size, None if kept is None else kept[1]
    )


def _resources(cluster: ClusterInfo | Mapping[str, float] | None) -> dict[str, float] | None:
    if isinstance(cluster, ClusterInfo):
        import ray

        return dict(ray.cluster_resources())
    return None if cluster is None else dict(cluster)


def _decided(workers: WorkersConfig, resources: Mapping[str, float] | None) -> WorkersConfig:
    """With ``use_gpu`` as the driver would decide it."""
    if workers.use_gpu is not None or resources is None:
        return workers
    return workers.model_copy(update={"use_gpu": resources.get("GPU", 0) >= (workers.least or workers.count)})


def _state_bytes(config: TrainConfig) -> dict[str, int]:
    """What training keeps of the whole model, exact: shapes alone are made."""
    model = meta_model(config.model)
    optimizer = Optimizer(model, config.optimizer, config.steps).state()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "weights": weights,
        "optimizer": sum(tensor.nbytes for tensor in optimizer.values()),
        "ema": weights if config.optimizer.ema_decay is not None else 0,
    }


def _memory(config: TrainRunConfig, train: TrainConfig, state: Mapping[str, int]) -> dict[str, int]:
    """Bytes of one worker: its part of the state, and the largest pictures' activations of a micro-batch."""
    parallel, workers = train.parallel, config.workers.count
    rows = -(-train.batch_size // workers // parallel.micro_batches)
    vision = train.model.vision.model_copy(update={"image_size": max(part.image_size for part in stretches(train))})
    largest = train.model.model_copy(update={"vision": vision})
    step = memory(largest, rows, train.precision, checkpointing=train.activation_checkpointing)
    shards = (parallel.shard_workers or workers) if parallel.kind == "fsdp" else 1
    gathered = state["weights"]
    if shards > 1 and parallel.reshard_after_forward:
        # Between blocks the rest stays gathered, and the next block's weights come while one works.
        gathered = state["weights"] - sum(_blocks(train)) + 2 * max(_blocks(train))
    parts = {
        "weights": state["weights"] // shards + (gathered if shards > 1 else 0),
        "gradients": state["weights"] // shards,
        "optimizer": state["optimizer"] // shards,
        "averaged_weights": state["ema"] // shards,
        # DDP reduces copies of the gradients, in buckets.
        "buckets": state["weights"] if shards == 1 and workers > 1 else 0,
        "bfloat16_copies": step.weight_copies * gathered // state["weights"],
        "activations": step.activations,
    }
    return {**parts, "total": sum(parts.values())}


def _blocks(config: TrainConfig) -> list[int]:
    """Bytes of each block that FSDP gathers apart."""
    model = meta_model(config.model)
    stacks = (model.vision, model.unimodal, model.multimodal)
    return [sum(p.nbytes for p in block.parameters()) for stack in stacks for block in stack.blocks]


def _hours(
    config: TrainRunConfig, train: TrainConfig, flops: int, resources: Mapping[str, float] | None
) -> dict[str, Any]:
    """``hours`` of all steps, and what the number rests on; None where nothing tells how fast the workers are."""
    rate, source = _device_rate(config.workers, train.precision, resources)
    if rate is None:
        return {"hours": None, "hours_assume": source}
    hours = flops / (config.workers.count * rate * UTILISATION) / 3600
    workers = config.workers.count
    assumed = (
        f"{workers} worker{'s' if workers > 1 else ''} at {UTILISATION:.0%} of {rate / 1e12:,.3g} TFLOP/s, {source}"
    )
    return {"hours": hours, "hours_assume": assumed}


def _device_rate(
    workers: WorkersConfig, precision: str, resources: Mapping[str, float] | None
) -> tuple[float | None, str]:
    """(operations a second of one worker's device, where the number is from)."""
    if workers.use_gpu is False or (workers.use_gpu is None and not torch.cuda.is_available()):
        before = torch.get_num_threads()
        torch.set_num_threads(workers.threads)
        try:
            rate = measure_matrix_rate(torch.device("cpu"), precision)
        finally:
            torch.set_num_threads(before)
        return rate, f"a matrix product measured on this machine with {workers.threads} threads"
    prefix = "accelerator_type:"
    kinds = sorted(name.removeprefix(prefix) for name in resources or {} if name.startswith(prefix))
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


def _ray(config: TrainRunConfig, resources: Mapping[str, float] | None) -> dict[str, Any]:
    each = resources_per_worker(config)
    workers = config.workers
    total = {name: amount * workers.count for name, amount in each.items()}
    least = {name: amount * (workers.least or workers.count) for name, amount in each.items()}
    there = None if resources is None else {name: resources.get(name, 0.0) for name in ("CPU", "GPU")}
    return {
        "workers": workers.count,
        "least_workers": workers.least or workers.count,
        "per_worker": each,
        "total": total,
        "cluster": there,
        "fits": None if there is None else all(there[name] >= amount for name, amount in least.items()),
    }


def _learning_rate(config: TrainConfig) -> dict[str, float]:
    rates = Optimizer(meta_model(config.model), config.optimizer, config.steps).learning_rate
    return {"first": rates(0), "peak": config.optimizer.learning_rate, "last": rates(config.steps - 1)}


def _datasets(mixture: "Mixture", config: TrainConfig, samples: int) -> list[dict[str, Any]]:
    """What each dataset gives: its share by lanes, which is what its weight comes to."""
    lanes = deal_lanes(config.lanes, [source.weight for source in mixture.sources])
    weights = sum(source.weight for source in mixture.sources)
    found = []
    for (dataset, weight), own in zip(mixture.sources, lanes, strict=True):
        seen = samples * own // config.lanes
        selected = int(dataset.row_groups["selected"].to_numpy().sum())
        found.append(
            {
                "dataset": dataset.store.uri,
                "version": dataset.record.version,
                "selected": selected,
                "lanes": own,
                "wanted_share": weight / weights,
                "share": own / config.lanes,
                "samples": seen,
                "passes": seen / selected if selected else None,
            }
        )
    return found


def print_plan(planned: Mapping[str, Any]) -> None:
    """Write a plan for people to stdout."""
    for name, told in _lines(planned):
        click.echo(f"{name:<14}{told}")


def _lines(planned: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", planned["run"]
    parts = sorted(planned["parameters_by_part"].items(), key=lambda item: -item[1])[:3]
    largest = ", ".join(f"{part} {_count_told(count)}" for part, count in parts)
    yield "parameters", f"{_count_told(planned['parameters'])} ({largest}, ...)"
    yield "steps", f"{planned['steps']:,} of {planned['batch_size']:,} samples: {planned['samples']:,}"
    for part in planned["stretches"]:
        dropped = f", {part['patch_dropout']:.0%} of the patches dropped" if part["patch_dropout"] else ""
        cost = f"{part['flops_per_sample'] / 1e9:,.4g} GFLOP a sample"
        yield "", f"from step {part['start']:,}: pictures of {part['image_size']} pixels{dropped}, {cost}"
    rates = planned["learning_rate"]
    yield (
        "learning rate",
        f"{rates['first']:.3g} at the first step, at most {rates['peak']:.3g}, {rates['last']:.3g} last",
    )
    for data in planned["datasets"]:
        passes = "no selected samples" if data["passes"] is None else f"{data['passes']:,.2f} passes"
        share = f"{data['share']:.1%} of each batch ({data['wanted_share']:.1%} wanted), {data['lanes']} lanes"
        yield "dataset", f"{data['dataset']} version {data['version']}, {data['selected']:,} samples: {passes}, {share}"
    kept = planned["memory_per_worker"]
    told = ", ".join(f"{name.replace('_', ' ')} {bytes_told(size)}" for name, size in kept.items() if size)
    yield "memory", f"a worker: {told}"
    size, count = planned["checkpoint_bytes"], planned["checkpoints_kept"]
    yield "checkpoints", f"{bytes_told(size)} each, {count} kept: {bytes_told(size * count)}"
    yield "FLOPs", f"{planned['flops']:.3g} in all"
    hours = planned["hours"]
    yield "time", f"{_time_told(hours)}: {planned['hours_assume']}"
    ray = planned["ray"]
    least = f", {ray['least_workers']} at least" if ray["least_workers"] < ray["workers"] else ""
    asked = ", ".join(f"{amount:g} {name}" for name, amount in ray["total"].items())
    yield (
        "Ray",
        f"{ray['workers']} worker{'s' if ray['workers'] > 1 else ''}{least}: {asked}; the cluster {_cluster_told(ray)}",
    )


def _time_told(hours: float | None) -> str:
    if hours is None:
        return "unknown"
    return format_duration(hours * 3600) if hours < 48 else f"{hours / 24:,.1f} days"


def _count_told(count: int) -> str:
    return f"{count / 1e6:,.1f}M" if count >= 1e6 else f"{count:,}"


def _cluster_told(ray: Mapping[str, Any]) -> str:
    if ray["cluster"] is None:
        return "is not known"
    there = ", ".join(f"{amount:g} {name}" for name, amount in ray["cluster"].items() if amount)
    return f"has {there or 'nothing'}{'' if ray['fits'] else ': NOT ENOUGH'}"
