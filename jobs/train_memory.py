"""What a worker of a run keeps in memory while it trains, and a checkpoint on disk."""

from collections.abc import Mapping

from coca.cost import meta_model
from coca.memory import autocast_matrices, memory
from coca.optim import Optimizer
from coca.parallel import gathered_units
from coca.train_config import TrainConfig
from jobs.train_speed import stretches


def state_bytes(config: TrainConfig) -> dict[str, int]:
    """What training keeps of the whole model, exact: shapes alone are made."""
    model = meta_model(config.model)
    optimizer = Optimizer(model, config.optimizer, config.steps).state()
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "weights": weights,
        "optimizer": sum(tensor.nbytes for tensor in optimizer.values()),
        "ema": weights if config.optimizer.ema_decay is not None else 0,
    }


def worker_bytes(train: TrainConfig, workers: int, state: Mapping[str, int]) -> dict[str, int]:
    """Bytes of one of so many workers and their ``total``: its part of the state, and what the largest micro-batch
    activates.

    Args:
        state: of the whole model, as `state_bytes` gives it.
    """
    parallel = train.parallel
    rows = -(-train.batch_size // workers // parallel.micro_batches)
    vision = train.model.vision.model_copy(update={"image_size": max(part.image_size for part in stretches(train))})
    largest = train.model.model_copy(update={"vision": vision})
    step = memory(largest, rows, train.precision, checkpointing=train.activation_checkpointing)
    shards = (parallel.shard_workers or workers) if parallel.kind == "fsdp" else 1
    gathered, copies = _gathered(train) if shards > 1 else (0, step.weight_copies)
    parts = {
        "weights": state["weights"] // shards + gathered,
        "gradients": state["weights"] // shards,
        "optimizer": state["optimizer"] // shards,
        "averaged_weights": state["ema"] // shards,
        "bfloat16_copies": copies,
        "activations": step.activations,
    }
    return {**parts, "total": sum(parts.values())}


def _gathered(train: TrainConfig) -> tuple[int, int]:
    """Bytes of what FSDP has gathered at once, at most, and of the copies that autocast keeps of it."""
    model = meta_model(train.model)
    units, inside, halved = [], set[int](), set[int]()
    for unit, precision in gathered_units(model, train.precision):
        own = {id(p): p.numel() for p in unit.parameters() if p.ndim > 1 and id(p) not in inside}
        inside |= own.keys()
        halved |= own.keys() if precision == "bfloat16" else set()
        units.append(sum(own.values()) * (2 if precision == "bfloat16" else 4))
    # With resharding the next unit's weights come while one works; what is in none stays gathered.
    in_units = 2 * max(units) if train.parallel.reshard_after_forward else sum(units)
    between = sum(p.nbytes for p in model.parameters() if id(p) not in inside)
    copied = sum(p.numel() for p in autocast_matrices(model) if id(p) not in halved)
    return between + in_units, 2 * copied if train.precision == "bfloat16" else 0
