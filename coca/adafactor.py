"""Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) as vision models are trained with it.

A matrix has dimension 0 for its rows and all others for its columns: a convolution's are input channels and kernel.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coca.shards import by_shard_group, local

_EPSILON = 1e-30  # Shazeer and Stern's, section 6
_DECAY_POWER = 0.8  # section 7.2


class Adafactor(torch.optim.Optimizer):
    """The variant of Zhai et al. 2021 (arXiv 2106.04560, section 3.4), whose published code is big_vision's.

    No relative step, no scaling by the parameters' size, no clipping of single updates; the first moment is kept, in
    float32 here (bfloat16 there); the second moment's decay is capped. At step t, counted from 1, with gradient G::

        b2 = min(beta2, 1 - t^-0.8)
        row_i    <- b2 row_i    + (1 - b2) (mean_j G_ij^2 + 1e-30)
        column_j <- b2 column_j + (1 - b2) (mean_i G_ij^2 + 1e-30)
        V_ij = row_i column_j / mean_j column_j
        M <- beta1 M + (1 - beta1) G / sqrt(V)
        W <- (1 - rate decay) W - rate M

    Of vectors and scalars V is kept whole. M starts at 0 and is not corrected for that. Parameters are whole or sharded
    by rows. State, allocated at once: ``first_moment``, ``row``, ``column`` or ``second_moment``, and ``step``; this
    rank's rows of all but ``column``, which every rank holds. ``step`` uses up the gradients' memory.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__(groups, {"lr": learning_rate, "betas": betas, "weight_decay": 0.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter] |= _zero_state(parameter.detach())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; under shards every rank calls it."""
        present = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        column_means = _column_means([parameter for parameter in present if parameter.ndim >= 2])
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            beta1, beta2 = group["betas"]
            for parameter in parameters:
                _precondition(local(parameter.grad), self.state[parameter], beta2, column_means.get(parameter))
            weights, updates = [[local(tensor) for tensor in part] for part in (parameters, _gradients(parameters))]
            moments = [self.state[parameter]["first_moment"] for parameter in parameters]
            torch._foreach_lerp_(moments, updates, 1 - beta1)
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(weights, moments, alpha=-group["lr"])


def _zero_state(parameter: Tensor) -> dict[str, Tensor]:
    part = local(parameter)
    state = {"step": torch.tensor(0.0), "first_moment": torch.zeros_like(part)}
    if part.ndim < 2:
        return state | {"second_moment": torch.zeros_like(part)}
    return state | {"row": part.new_zeros(part.shape[0]), "column": part.new_zeros(part.shape[1:])}


def _precondition(gradient: Tensor, state: dict[str, Tensor], beta2: float, column_mean: Tensor | None) -> None:
    """Count the step, update the second moment and divide the gradient by its root, in place."""
    state["step"] += 1
    fresh = 1 - min(beta2, 1 - state["step"].item() ** -_DECAY_POWER)
    if column_mean is None:
        second = state["second_moment"].lerp_(gradient.square().add_(_EPSILON), fresh)
        gradient.mul_(second.rsqrt())
        return
    columns = column_mean.numel()
    row_mean = torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim))).square() / columns
    row = state["row"].lerp_(row_mean + _EPSILON, fresh)
    column = state["column"].lerp_(column_mean + _EPSILON, fresh)
    # The mean of the columns is that of the rows, and every rank has it.
    row_factor = (row / column.mean()).rsqrt()
    gradient.mul_(row_factor.view(-1, *[1] * (gradient.ndim - 1))).mul_(column.rsqrt())


def _column_means(matrices: list[Tensor]) -> dict[Tensor, Tensor]:
    """By parameter, the mean over all rows of the squared gradients, in one sum over ranks for all."""
    found: dict[Tensor, Tensor] = {}
    for group, members in by_shard_group(matrices):
        sums = [torch.linalg.vector_norm(local(gradient), dim=0).square() for gradient in _gradients(members)]
        if group is not None:
            flat = torch.cat([each.flatten() for each in sums])
            dist.all_reduce(flat, group=group)
            parts = flat.split([each.numel() for each in sums])
            sums = [part.view(each.shape) for part, each in zip(parts, sums, strict=True)]
        found |= {parameter: each / parameter.shape[0] for parameter, each in zip(members, sums, strict=True)}
    return found


def _gradients(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
