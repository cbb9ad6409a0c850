"""Training: one function, readable from top to bottom, on one process or as one rank of many.

Run it under plain Python, torchrun or Ray Train: whoever starts it has initialised torch.distributed where there is
more than one rank.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from coca.checkpoint import ResumeState, checkpoint_path, load_resume, save_checkpoint
from coca.code_version import code_version
from coca.config import Preprocessing
from coca.dataset import Dataset
from coca.distributed import all_gather_list, rank, sum_over_ranks, world_size
from coca.errors import BadInput, RunFailed
from coca.feed import Batch, Feed, batch_digest, normalize
from coca.model import CoCa
from coca.objective import Losses, Objective
from coca.optim import Optimizer
from coca.run_folder import RunFolder
from coca.train_config import TrainConfig

Report = Callable[[dict[str, Any]], None]


def train(
    config: TrainConfig,
    dataset: Dataset,
    run: RunFolder,
    *,
    device: torch.device,
    report: Report,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Train until ``config.steps``, going on from the run's newest checkpoint.

    Args:
        report: called on rank 0 with each row of metrics.jsonl.
        should_stop: asked after each step; True saves a checkpoint and ends early. All ranks must get the same answer.

    Returns:
        ``steps``, ``final_loss``, ``samples_per_s`` and ``checkpoint`` (path under the run folder).

    Raises:
        BadInput: config and dataset do not fit each other or the checkpoint.
        RunFailed: the loss is not finite.
    """
    # --- build -----------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    config = fit_to_dataset(config, dataset)
    model = CoCa(config.model).to(device)
    model.checkpoint_activations(config.activation_checkpointing)
    optimizer = Optimizer(model, config.optimizer, config.steps)
    preprocessing = Preprocessing(image_size=config.model.vision.image_size)

    # --- resume ----------------------------------------------------------------------------------------------------
    position = _resume(config, dataset, run, model, optimizer)
    objective = _parallelize(Objective(model, config.loss, compiled=config.compile), device)
    batches = Feed(dataset, config, rank=rank(), world_size=world_size()).batches(position)

    # --- loop ------------------------------------------------------------------------------------------------------
    model.train()
    started, first, row = time.perf_counter(), position, {}
    data_wait_s, logged_at, logged_step = 0.0, started, position
    try:
        while position < config.steps:
            waited = time.perf_counter()
            batch = next(batches)
            data_wait_s += time.perf_counter() - waited
            losses, grad_norm = _step(objective, optimizer, batch, config, preprocessing, device, position)
            model.clamp_logit_scale()
            position += 1

            last = position == config.steps
            stopping = should_stop()
            # Gradients that are no numbers end the run at once: no checkpoint holds what they made of the weights.
            if position % config.log_every == 0 or last or stopping or not math.isfinite(grad_norm):
                row = _metrics(config, optimizer, position, batch, losses, grad_norm)
                now = time.perf_counter()
                rate = (position - logged_step) * config.batch_size / (now - logged_at)
                timings = {"samples_per_s": rate, "data_wait_s": data_wait_s, "wall_s": now - started}
                data_wait_s, logged_at, logged_step = 0.0, now, position
                _check_finite(row)
                if rank() == 0:
                    run.append_metrics(row | timings)
                    report(row | timings)
            if position % config.checkpoint_every == 0 or last or stopping:
                _save(run, position, model, optimizer, preprocessing, dataset, config)
            if stopping:
                break
    finally:
        batches.close()
    elapsed = time.perf_counter() - started
    if not row:
        row = next((r for r in reversed(run.read_metrics()) if r["step"] <= position), {})
    return {
        "steps": position,
        "final_loss": row.get("loss"),
        "samples_per_s": (position - first) * config.batch_size / elapsed if position > first else None,
        "checkpoint": checkpoint_path(position),
    }


def fit_to_dataset(config: TrainConfig, dataset: Dataset) -> TrainConfig:
    """The config with the vocabulary size and special ids of the dataset's tokenizer, which decides them."""
    tokenizer = dataset.tokenizer
    ids = {"pad_id": tokenizer.pad_id, "begin_id": tokenizer.begin_id, "end_id": tokenizer.end_id}
    text = config.model.text.model_copy(update={"vocab_size": tokenizer.vocab_size, **ids})
    return config.model_copy(update={"model": config.model.model_copy(update={"text": text})})


def _resume(config: TrainConfig, dataset: Dataset, run: RunFolder, model: CoCa, optimizer: Optimizer) -> int:
    step = run.latest_step()
    seen = all_gather_list([-1 if step is None else step])
    if any(other != seen[0] for other in seen):
        raise BadInput(
            f"the workers see different checkpoints in {run.path}: newest steps {sorted(other[0] for other in seen)}",
            "Give --out a folder that every worker shares",
        )
    if step is None:
        if rank() == 0:
            run.forget_metrics_after(0)
        return 0
    state = load_resume(run.store, checkpoint_path(step), model)
    check_same_run(state.fixed, fixed_fields(config, dataset), run)
    optimizer.load_state(state.optimizer)
    if rank() == 0:
        run.forget_metrics_after(step)
    return state.position


def fixed_fields(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """What a resumed run must share with the run it continues, flat: everything that decides its numbers."""
    changeable = {"log_every", "checkpoint_every", "keep_checkpoints", "activation_checkpointing"}
    values = config.model_dump(mode="json", exclude=changeable)
    record = dataset.record
    values["data"] = {
        "version": record.version,
        "row_groups": record.row_groups_sha256,
        "tokenizer": record.tokenizer.fingerprint,
    }
    return _flatten(values)


def check_same_run(saved: dict[str, Any], wanted: dict[str, Any], run: RunFolder) -> None:
    """Raises BadInput, naming what differs, unless a run can go on under ``wanted``."""
    differing = [name for name in sorted(saved.keys() | wanted.keys()) if saved.get(name) != wanted.get(name)]
    if not differing:
        return
    own_dataset = "Give the dataset it was started with, or another --out for a new run"
    if "data.tokenizer" in differing:
        raise BadInput(
            f"{run.path} was started on tokens of the tokenizer {saved.get('data.tokenizer')}, this dataset was written"
            f" by {wanted['data.tokenizer']}",
            own_dataset,
        )
    if "data.row_groups" in differing and "data.version" not in differing:
        raise BadInput(f"{run.path} was started on another dataset", own_dataset)
    name = "data.version" if "data.version" in differing else differing[0]
    raise BadInput(
        f"{run.path} was started with {name} = {saved.get(name)!r}, now it is {wanted.get(name)!r}",
        "Give the old value to go on, or another --out for a new run",
    )


def _parallelize(objective: Objective, device: torch.device) -> torch.nn.Module:
    if world_size() == 1:
        return objective
    return DistributedDataParallel(objective, device_ids=[device] if device.type == "cuda" else None)


def _step(
    objective: torch.nn.Module,
    optimizer: Optimizer,
    batch: Batch,
    config: TrainConfig,
    preprocessing: Preprocessing,
    device: torch.device,
    step: int,
) -> tuple[Losses, float]:
    """One optimizer step: (losses of this rank, gradient norm)."""
    images_BCHW = normalize(batch.pixels_BHWC.to(device, non_blocking=True), preprocessing)
    tokens_BT = batch.tokens_BT.to(device, non_blocking=True)
    kept_patches_BK = batch.kept_patches_BK
    if kept_patches_BK is not None:
        kept_patches_BK = kept_patches_BK.to(device, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        losses: Losses = objective(images_BCHW, tokens_BT, kept_patches_BK)
    total = config.loss.contrastive_weight * losses.contrastive + config.loss.captioning_weight * losses.captioning
    total.backward()
    return Losses(losses.contrastive.detach(), losses.captioning.detach()), optimizer.step(step)


def _metrics(
    config: TrainConfig,
    optimizer: Optimizer,
    step: int,
    batch: Batch,
    losses: Losses,
    grad_norm: float,
) -> dict[str, Any]:
    contrastive, captioning = (sum_over_ranks(loss).item() / world_size() for loss in losses)
    # Rank r owns lanes r, r + world, ...: interleaving the ranks' digests gives lane order.
    by_rank = all_gather_list(batch.lane_digests)
    return {
        "step": step,
        "samples_seen": step * config.batch_size,
        "batch_digest": batch_digest([digest for lane in zip(*by_rank, strict=True) for digest in lane]),
        "loss": config.loss.contrastive_weight * contrastive + config.loss.captioning_weight * captioning,
        "contrastive_loss": contrastive,
        "captioning_loss": captioning,
        "learning_rate": optimizer.learning_rate(step - 1),
        "grad_norm": grad_norm,
    }


def _check_finite(row: dict[str, Any]) -> None:
    if not torch.isfinite(torch.tensor([row["loss"], row["grad_norm"]])).all():
        raise RunFailed(
            f"step {row['step']}: loss {row['loss']}, gradient norm {row['grad_norm']}; lower the learning rate or look"
            f" at the samples of batch {row['batch_digest']}"
        )


def _save(
    run: RunFolder,
    position: int,
    model: CoCa,
    optimizer: Optimizer,
    preprocessing: Preprocessing,
    dataset: Dataset,
    config: TrainConfig,
) -> None:
    if rank() != 0:
        return
    save_checkpoint(
        run.store,
        checkpoint_path(position),
        model=model,
        tokenizer=dataset.tokenizer,
        preprocessing=preprocessing,
        step=position,
        provenance={
            "dataset": dataset.store.uri,
            "dataset_version": dataset.record.version,
            "code_version": code_version(),
            "seed": config.seed,
        },
        resume=ResumeState(optimizer.state(), position, fixed_fields(config, dataset)),
    )
    run.keep_newest(config.keep_checkpoints)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
