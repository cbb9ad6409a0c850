"""What a worker of a run keeps in memory while it trains, and a checkpoint on disk."""

from collections.abc import Mapping

from coca.cost import meta_model
from coca.memory import memory
from coca.optim import Optimizer
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
    blocks = _blocks(train)
    between = state["weights"] - sum(blocks)  # stays gathered
    # With resharding the next block's weights come while one works.
    in_blocks = 2 * max(blocks) if parallel.reshard_after_forward else sum(blocks)
    gathered = between + (in_blocks // 2 if train.precision == "bfloat16" else in_blocks)
    parts = {
        "weights": state["weights"] // shards + gathered if shards > 1 else state["weights"],
        "gradients": state["weights"] // shards,
        "optimizer": state["optimizer"] // shards,
        "averaged_weights": state["ema"] // shards,
        # FSDP gathers the blocks' weights as such.
        "bfloat16_copies": step.weight_copies * (between if shards > 1 else state["weights"]) // state["weights"],
        "activations": step.activations,
    }
    return {**parts, "total": sum(parts.values())}


def _blocks(config: TrainConfig) -> list[int]:
    """Bytes of each block that FSDP gathers apart."""
    model = meta_model(config.model)
    stacks = (model.vision, model.unimodal, model.multimodal)
    return [sum(p.nbytes for p in block.parameters()) for stack in stacks for block in stack.blocks]
