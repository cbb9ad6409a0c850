"""One step's gradients, with the batch of a worker computed at once or in parts.

In parts, the contrastive loss still compares the whole global batch (GradCache, Gao et al. 2021, arXiv 2101.06983):

1. the features of all parts, without keeping what a backward pass needs;
2. the contrastive loss over all features, and its gradients by them, which are cached;
3. each part once more, now with a backward pass from its share of the captioning loss and from its features, whose
   gradients are at hand.

Nothing in the model is random, so both passes see the same features, and the gradients are those of the whole batch.

Shapes: B batch, C channels, H height, W width, T tokens, K patches kept.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from coca.losses import real_targets
from coca.objective import Cached, Features, Losses, Objective
from coca.parallel import average_whole_gradients, gradient_communication, unwrapped
from coca.train_config import LossConfig

Autocast = Callable[[], AbstractContextManager[None]]


class _Part(NamedTuple):
    images_BCHW: Tensor
    tokens_BT: Tensor
    kept_patches_BK: Tensor | None


def forward_backward(
    objective: nn.Module,
    images_BCHW: Tensor,
    tokens_BT: Tensor,
    kept_patches_BK: Tensor | None,
    loss: LossConfig,
    micro_batches: int,
    autocast: Autocast,
) -> Losses:
    """Add to each parameter's ``grad`` that of the weighted losses of the global batch, the same on all ranks.

    Args:
        objective: what ``parallelize`` gave.
        images_BCHW, tokens_BT, kept_patches_BK: this rank's share of the global batch; ranks hold equally many rows.
        loss: the weights of the losses.
        micro_batches: parts, as equal as can be and at least a row each, that follow one another. With DDP ranks
            communicate gradients in the last one only.
        autocast: makes a context for a forward pass; each pass gets one of its own, since a context keeps the weights
            that it cast, and those cast without gradients would have none later.

    Returns:
        The losses of this rank, detached, not weighted.
    """
    batch = _Part(images_BCHW, tokens_BT, kept_patches_BK)
    if micro_batches == 1:
        losses = _backward(objective, batch, None, loss, autocast, communicate=True)
    else:
        losses = _in_parts(objective, batch, loss, micro_batches, autocast)
    average_whole_gradients(objective)
    return losses


def _in_parts(objective: nn.Module, batch: _Part, loss: LossConfig, micro_batches: int, autocast: Autocast) -> Losses:
    inside = unwrapped(objective)
    parts = _split(batch, micro_batches)
    features = [_features(inside, part, autocast) for part in parts]
    whole = Features(*(torch.cat(values) for values in zip(*features, strict=True)))
    contrastive, by_features, by_scalars = _contrastive_gradients(inside, whole, batch.tokens_BT, autocast)

    targets = real_targets(batch.tokens_BT, inside.model.config.text.pad_id)
    shares = tuple(gradient / len(parts) for gradient in by_scalars)
    sizes = [len(part.tokens_BT) for part in parts]
    by_part = [Features(*pair) for pair in zip(*(gradient.split(sizes) for gradient in by_features), strict=True)]
    captioning = torch.zeros_like(contrastive)
    for number, (part, gradients) in enumerate(zip(parts, by_part, strict=True), start=1):
        cached = Cached(gradients, shares, targets)
        last = number == len(parts)
        captioning = captioning + _backward(objective, part, cached, loss, autocast, communicate=last).captioning
    return Losses(contrastive, captioning)


def _backward(
    objective: nn.Module,
    part: _Part,
    cached: Cached | None,
    loss: LossConfig,
    autocast: Autocast,
    *,
    communicate: bool,
) -> Losses:
    with gradient_communication(objective, communicate):
        with autocast():
            losses: Losses = objective(*part, cached)
        total = loss.contrastive_weight * losses.contrastive + loss.captioning_weight * losses.captioning
        total.backward()
    return Losses(losses.contrastive.detach(), losses.captioning.detach())


@torch.no_grad()
def _features(objective: Objective, part: _Part, autocast: Autocast) -> Features:
    with autocast():
        return objective.features(*part)


def _contrastive_gradients(
    objective: Objective, features: Features, tokens_BT: Tensor, autocast: Autocast
) -> tuple[Tensor, Features, tuple[Tensor, ...]]:
    """(the contrastive loss, its gradients by the features, those by the objective's scalars)."""
    leaves = Features(*(value.detach().requires_grad_() for value in features))
    with autocast():
        contrastive = objective.contrastive(leaves, tokens_BT)
    images_BE, texts_BE, *scalars = torch.autograd.grad(contrastive, [*leaves, *objective.scalars])
    return contrastive.detach(), Features(images_BE, texts_BE), tuple(scalars)


def _split(batch: _Part, micro_batches: int) -> list[_Part]:
    parts = min(micro_batches, len(batch.tokens_BT))
    columns = [[None] * parts if value is None else value.tensor_split(parts) for value in batch]
    return [_Part(*column) for column in zip(*columns, strict=True)]
