"""Training: one function, readable from top to bottom, on one process or as one rank of many.

Run it under plain Python, torchrun or Ray Train: whoever starts it has initialised torch.distributed where there is
more than one rank.
"""

import math
import time
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from coca.accumulate import forward_backward
from coca.checkpoint import PlainParts, checkpoint_path
from coca.checkpoint_saver import CheckpointSaver
from coca.code_version import code_version
from coca.config import Preprocessing
from coca.distributed import all_gather_list, rank, sum_over_ranks, world_size
from coca.ema import Ema
from coca.errors import RunFailed
from coca.feed import Batch, batch_digest, normalize
from coca.goodput import CHECKPOINT, EVALUATION, RESTORING, Goodput
from coca.held_out import HeldOut
from coca.meter import Meter
from coca.mixture import Mixture
from coca.model import CoCa
from coca.nonfinite import nonfinite_samples
from coca.objective import Losses, Objective
from coca.optim import Optimizer
from coca.parallel import full_weights, parallelize
from coca.progress import polling
from coca.resize_weights import at_image_size
from coca.restore import read_fixed, restore
from coca.run_folder import RunFolder
from coca.same_run import check_same_run, fit_to_tokenizer, fixed_fields
from coca.side_group import SideGroup
from coca.train_config import TrainConfig
from coca.training_state import TrainingState

Batches = Callable[[int], Generator[Batch]]
Report = Callable[[dict[str, Any]], None]


def train(
    config: TrainConfig,
    mixture: Mixture,
    run: RunFolder,
    *,
    batches: Batches,
    device: torch.device,
    report: Report = lambda row: None,
    should_stop: Callable[[], bool] = lambda: False,
    held_out: HeldOut | None = None,
    beat: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Train until ``config.steps``, going on from the run's newest whole checkpoint.

    Args:
        batches: this rank's share of the global batches from a position on.
        report: called on rank 0 with each row of metrics.jsonl.
        should_stop: asked after each step; True saves a checkpoint and ends early. All ranks must get the same answer.
        held_out: on rank 0 alone, where the run is to be judged on the way.
        beat: called after each step.

    Returns:
        ``steps``, ``final_loss``, ``samples_per_s``, ``skipped_steps``, ``goodput`` and ``checkpoint`` (path under the
        run folder).

    Raises:
        BadInput: config, datasets and checkpoint do not fit each other.
        RunFailed: too many steps without finite gradients, or the storage fails.
    """
    # --- build -----------------------------------------------------------------------------------------------------
    torch.manual_seed(config.seed)
    goodput = Goodput(run.store, world_size()) if rank() == 0 else None
    meter = Meter(config, device, world_size(), goodput)
    config = fit_to_tokenizer(config, mixture.tokenizer)
    model = CoCa(config.model).to(device)
    model.checkpoint_activations(config.activation_checkpointing)
    objective = parallelize(
        Objective(model, config.loss, compiled=config.compile), config.parallel, device, config.precision
    )
    optimizer = Optimizer(model, config.optimizer, config.steps)
    ema = Ema(model, config.optimizer.ema_decay) if config.optimizer.ema_decay else None
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=config.precision == "bfloat16")
    side = SideGroup()
    judged = side.any(held_out is not None)

    # --- resume ----------------------------------------------------------------------------------------------------
    fixed = fixed_fields(config, mixture)
    tensors = _state_tensors(model, optimizer, ema)
    with meter.losing(RESTORING):
        check_same_run(read_fixed(run), fixed, run)
        restored = restore(run, tensors)
    torch.set_rng_state(tensors["rng/torch"])
    position, skipped = (restored.position, restored.counters["skipped_steps"]) if restored else (0, 0)
    if rank() == 0:
        run.forget_metrics_after(position)

    # --- loop ------------------------------------------------------------------------------------------------------
    model.train()
    first, started, row, saved = position, time.perf_counter(), {}, False
    saver = CheckpointSaver(run, keep=config.keep_checkpoints, keep_best=config.keep_best, beat=beat)
    meter.begin(position)
    coming = batches(position)
    try:
        with saver:
            while position < config.steps:
                with meter.waiting():
                    batch = next(coming)
                images_BCHW, tokens_BT, kept_patches_BK = _on_device(batch, device)
                losses = forward_backward(
                    objective,
                    images_BCHW,
                    tokens_BT,
                    kept_patches_BK,
                    config.loss,
                    config.parallel.micro_batches,
                    autocast,
                )
                grad_norm = optimizer.step(position)
                if math.isfinite(grad_norm):
                    model.clamp_logit_scale()
                    if ema is not None:
                        ema.update(position)
                else:
                    skipped += 1
                    if skipped > config.optimizer.max_skipped_steps:
                        with autocast():
                            bad = nonfinite_samples(objective, images_BCHW, tokens_BT, batch.sample_ids)
                        raise _too_many_skipped(position + 1, skipped, side.gather(bad))
                position += 1
                meter.step(batch)
                beat()

                last, stopping = position == config.steps, should_stop()
                judging = judged and (last or _due(position, config.evaluate_every))
                saving = last or stopping or _due(position, config.checkpoint_every)
                weights: dict[str, Tensor] = {}
                if judging or saving:
                    with meter.losing(CHECKPOINT):
                        saver.wait()  # memory for one copy of the weights, not two
                        weights = _weights_for_use(model, ema)
                if judging or last or stopping or _due(position, config.log_every):
                    row = _numbers(config, optimizer, model, position, batch, losses, grad_norm, skipped)
                    if judging:
                        with meter.losing(EVALUATION), polling(beat, every_s=5.0), autocast():
                            if held_out is not None:
                                row |= _judge(held_out, weights, config, mixture, run, position, device)
                            side.any(False)  # the others wait here, not in the next step
                    timings = meter.row(position, position * config.batch_size)
                    if rank() == 0:
                        run.append_metrics(row | timings)
                        report(row | timings)
                if saving:
                    tensors = _state_tensors(model, optimizer, ema)
                    state = TrainingState(position, tensors, fixed, {"skipped_steps": skipped})
                    plain = _plain(config, mixture, weights, position)
                    score = row.get(config.keep_best) if config.keep_best and row.get("step") == position else None
                    meter.lose(CHECKPOINT, saver.save(state, plain, score=score))
                saver.check()
                if stopping:
                    break
        saved = True
    finally:
        coming.close()
        side.close()
        meter.close(finished=saved and position == config.steps)
    elapsed_s = time.perf_counter() - started
    if not row and rank() == 0:
        row = run.last_metrics() or {}
    return {
        "steps": position,
        "final_loss": row.get("loss"),
        "samples_per_s": (position - first) * config.batch_size / elapsed_s if position > first else None,
        "checkpoint": checkpoint_path(position),
        "skipped_steps": skipped,
        "goodput": None if goodput is None else goodput.row()["goodput"],
    }


def _due(position: int, every: int) -> bool:
    return every > 0 and position % every == 0


def _on_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """(images_BCHW, tokens_BT, kept_patches_BK)."""
    pixels_BHWC = batch.pixels_BHWC.to(device, non_blocking=True)
    kept_patches_BK = batch.kept_patches_BK
    if kept_patches_BK is not None:
        kept_patches_BK = kept_patches_BK.to(device, non_blocking=True)
    images_BCHW = normalize(pixels_BHWC, Preprocessing(image_size=pixels_BHWC.shape[1]))
    return images_BCHW, batch.tokens_BT.to(device, non_blocking=True), kept_patches_BK


def _numbers(
    config: TrainConfig,
    optimizer: Optimizer,
    model: CoCa,
    step: int,
    batch: Batch,
    losses: Losses,
    grad_norm: float,
    skipped: int,
) -> dict[str, Any]:
    """The fields of a row that are the same in every run of the same config and data."""
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
        "temperature": 1 / model.logit_scale.item(),
        "skipped_steps": skipped,
    }


def _too_many_skipped(step: int, skipped: int, bad_by_rank: list[list[str]]) -> RunFailed:
    bad = [sample_id for ids in bad_by_rank for sample_id in ids]
    shown = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
    failure = RunFailed(
        f"step {step}: the gradients are no finite numbers, in {skipped} steps so far; "
        + (f"of this batch, the samples {shown} make them so. " if bad else "no sample of this batch does it alone. ")
        + "Withdraw the samples, allow more with optimizer.max_skipped_steps, or begin a new run with a lower rate"
    )
    failure.repeat_helps = False
    return failure


def _weights_for_use(model: CoCa, ema: Ema | None) -> dict[str, Tensor]:
    """On rank 0 all weights, averaged where averages are kept; on CPU. Collective."""
    if ema is None:
        return full_weights(model)
    with ema.applied():
        return full_weights(model)


def _judge(
    held_out: HeldOut,
    weights: dict[str, Tensor],
    config: TrainConfig,
    mixture: Mixture,
    run: RunFolder,
    step: int,
    device: torch.device,
) -> dict[str, float]:
    parts = _plain(config, mixture, weights, step)
    with torch.device("meta"):
        model = CoCa(parts.config)
    model.load_state_dict({name: value.to(device) for name, value in parts.weights.items()}, assign=True)
    measures, captions = held_out.evaluate(model, mixture.tokenizer, parts.preprocessing)
    held_out.save(run.store, step, measures, captions)
    return {f"held_out_{name}": value for name, value in measures.items()}


def _plain(config: TrainConfig, mixture: Mixture, weights: dict[str, Tensor], step: int) -> PlainParts:
    """What a checkpoint offers for use; its size of pictures is that of the step that made the weights."""
    size, model = config.image_size(max(step - 1, 0)), config.model
    if weights:
        model, weights = at_image_size(model, weights, size)
    return PlainParts(
        weights=weights,
        config=model,
        tokenizer=mixture.tokenizer,
        preprocessing=Preprocessing(image_size=size),
        provenance={**mixture.provenance(), "code_version": code_version(), "seed": config.seed},
        step=step,
    )


def _state_tensors(model: CoCa, optimizer: Optimizer, ema: Ema | None) -> dict[str, Tensor]:
    """All tensors of the run, sharing memory with what they belong to."""
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"optimizer/{name}": value for name, value in optimizer.state().items()}
    if ema is not None:
        tensors |= {f"ema/{name}": value for name, value in ema.state().items()}
    return tensors | {"rng/torch": torch.get_rng_state()}
