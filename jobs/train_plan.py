"""`coca train --dry-run`: what a run will take, from its config and its data, before anything is started."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from coca.cost import meta_model, parameters
from coca.optim import Optimizer
from coca.order import deal_lanes
from coca.progress import format_duration
from coca.same_run import fit_to_tokenizer
from coca.train_config import TrainConfig
from jobs.attempt import resources_per_worker
from jobs.cluster import ClusterInfo
from jobs.config import TrainRunConfig, WorkersConfig
from jobs.data_report_figures import bytes_told
from jobs.elastic import world_sizes
from jobs.trackers import check_trackers
from jobs.train_memory import state_bytes, worker_bytes
from jobs.train_speed import UTILISATION, device_rate, stretch_flops, stretches

if TYPE_CHECKING:
    from coca.mixture import Mixture

Nodes = Sequence[Mapping[str, float]]


def plan(
    config: TrainRunConfig,
    mixture: "Mixture",
    cluster: ClusterInfo | Nodes | None,
    *,
    resumed_from: int | None = None,
) -> dict[str, Any]:
    """What a run will take: plain values, sizes in bytes, times in hours.

    Memory is that of the fullest worker without what operations need for themselves, at captions of the whole context.
    FLOPs are counted so too, so hours are rather too many than too few. An elastic run is reckoned with the most
    workers that it may have, its memory with the least too.

    Args:
        cluster: a connection, or each node's resources as Ray names them; None where no cluster is known.
        resumed_from: steps that are done: hours and rates are those of the others.

    Raises:
        BadInput: a tracker's package is missing, no number of workers that does, a rule that matches nothing.
    """
    check_trackers(config.trackers)
    nodes = _nodes(cluster)
    config = config.model_copy(update={"workers": _decided(config.workers, nodes)})
    train = fit_to_tokenizer(config.train, mixture.tokenizer)
    sizes = world_sizes(config.workers, config.train)
    least, most = sizes[0], sizes[-1]
    state = state_bytes(train)
    parts = parameters(train.model)
    samples = train.steps * train.batch_size
    return {
        "run": config.out,
        "steps": train.steps,
        "resumed_from": resumed_from,
        "steps_left": max(train.steps - (resumed_from or 0), 0),
        "batch_size": train.batch_size,
        "samples": samples,
        "parameters": sum(parts.values()),
        "parameters_by_part": {part: count for part, count in parts.items() if count},
        **_speed(config.workers, train, most, nodes, resumed_from or 0),
        "memory_per_worker": worker_bytes(train, most, state),
        "memory_per_worker_of_least": worker_bytes(train, least, state),
        "ray": _ray(config, least, most, nodes),
        "checkpoint_bytes": 2 * state["weights"] + state["optimizer"] + state["ema"],
        "checkpoints_kept": train.keep_checkpoints + (train.keep_best is not None),
        "learning_rate": _learning_rate(train),
        "datasets": _datasets(mixture, train, samples),
    }


def _nodes(cluster: ClusterInfo | Nodes | None) -> Nodes | None:
    if isinstance(cluster, ClusterInfo):
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return cluster


def _decided(workers: WorkersConfig, nodes: Nodes | None) -> WorkersConfig:
    """With ``use_gpu`` as the driver would decide it."""
    if workers.use_gpu is not None or nodes is None:
        return workers
    return workers.model_copy(update={"use_gpu": any(node.get("GPU", 0) > 0 for node in nodes)})


def _speed(workers: WorkersConfig, train: TrainConfig, count: int, nodes: Nodes | None, done: int) -> dict[str, Any]:
    """``flops`` of all steps and each stretch's of a sample; ``samples_per_s``, and ``hours`` of the steps that are
    left, with what they rest on: None where nothing tells how fast the workers are."""
    parts = [(part, stretch_flops(train, part)) for part in stretches(train)]
    each, source = device_rate(workers, train.precision, nodes)
    rate = None if each is None else count * each * UTILISATION
    left = sum(part.steps_from(done) * train.batch_size * cost for part, cost in parts)
    told = f"{count} worker{'s' if count > 1 else ''} at {UTILISATION:.0%} of"
    return {
        "stretches": [
            {**part._asdict(), "flops_per_sample": cost, "samples_per_s": rate and rate / cost} for part, cost in parts
        ],
        "flops": sum(part.steps * train.batch_size * cost for part, cost in parts),
        "hours": None if rate is None else left / rate / 3600,
        "hours_assume": source if each is None else f"{told} {each / 1e12:,.3g} TFLOP/s, {source}",
    }


def _ray(config: TrainRunConfig, least: int, most: int, nodes: Nodes | None) -> dict[str, Any]:
    """What is asked of Ray; ``fits`` tells whether the cluster, were nothing else on it, has places for the least."""
    each = resources_per_worker(config)
    there = None if nodes is None else {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
    places = None if nodes is None else sum(_places(node, each) for node in nodes)
    return {
        "workers": most,
        "least_workers": least,
        "per_worker": each,
        "total": {name: amount * most for name, amount in each.items()},
        "cluster": there,
        "places": places,
        "fits": None if places is None else places >= least,
    }


def _places(node: Mapping[str, float], each: Mapping[str, float]) -> int:
    """Workers that fit on a node: none can lie on two."""
    return min(int((node.get(name, 0.0) + 1e-6) / amount) for name, amount in each.items())


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
    done = "" if planned["resumed_from"] is None else f"; goes on from step {planned['resumed_from']:,}"
    yield "steps", f"{planned['steps']:,} of {planned['batch_size']:,} samples: {planned['samples']:,}{done}"
    for part in planned["stretches"]:
        dropped = f", {part['patch_dropout']:.0%} of the patches dropped" if part["patch_dropout"] else ""
        cost = f"{part['flops_per_sample'] / 1e9:,.4g} GFLOP a sample"
        rate = "" if part["samples_per_s"] is None else f", {part['samples_per_s']:,.4g} samples/s"
        yield "", f"from step {part['start']:,}: pictures of {part['image_size']} pixels{dropped}, {cost}{rate}"
    rates = planned["learning_rate"]
    yield (
        "learning rate",
        f"{rates['first']:.3g} at the first step, at most {rates['peak']:.3g}, {rates['last']:.3g} last",
    )
    for data in planned["datasets"]:
        passes = "no selected samples" if data["passes"] is None else f"{data['passes']:,.2f} passes"
        share = f"{data['share']:.1%} of each batch ({data['wanted_share']:.1%} wanted), {data['lanes']} lanes"
        yield "dataset", f"{data['dataset']} version {data['version']}, {data['selected']:,} samples: {passes}, {share}"
    ray = planned["ray"]
    yield "memory", f"a worker{_of_workers(ray['workers'])}: {_bytes_by_part(planned['memory_per_worker'])}"
    if ray["least_workers"] < ray["workers"]:
        kept = _bytes_by_part(planned["memory_per_worker_of_least"])
        yield "", f"a worker{_of_workers(ray['least_workers'])}: {kept}"
    size, count = planned["checkpoint_bytes"], planned["checkpoints_kept"]
    yield "checkpoints", f"{bytes_told(size)} each, {count} kept: {bytes_told(size * count)}"
    yield "FLOPs", f"{planned['flops']:.3g} in all"
    left = "" if planned["resumed_from"] is None else f" for the {planned['steps_left']:,} steps left"
    yield "time", f"{_time_told(planned['hours'])}{left}: {planned['hours_assume']}"
    least = f", {ray['least_workers']} at least" if ray["least_workers"] < ray["workers"] else ""
    asked = ", ".join(f"{amount:g} {name}" for name, amount in ray["total"].items())
    yield (
        "Ray",
        f"{ray['workers']} worker{'s' if ray['workers'] > 1 else ''}{least}: {asked}; the cluster {_cluster_told(ray)}",
    )


def _of_workers(count: int) -> str:
    return f" of {count}" if count > 1 else ""


def _bytes_by_part(kept: Mapping[str, int]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {bytes_told(size)}" for name, size in kept.items() if size)


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
    places = f", places for {ray['places']} of them on its nodes: NOT ENOUGH"
    return f"has {there or 'nothing'}{'' if ray['fits'] else places}"
