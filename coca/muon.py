"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): momentum made orthogonal, also for sharded matrices.

``torch.optim.Muon`` takes whole matrices only, as far as numbers can be relied on, and iterates in bfloat16 everywhere.
That rounds a last bit of a gradient up to a thousandth of the update, so that runs over other numbers of workers drift
apart: on GPUs, where float32 would be many times slower, this stays so; on CPUs the iteration is float32.

Shapes: R rows, C columns of a matrix.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coca.shards import by_shard_group, local, rows_by_rank

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(torch.optim.Optimizer):
    """B <- mu B + (1 - mu) G; U = orthogonalized((1 - mu) G + mu B);
    W <- (1 - rate decay) W - rate sqrt(max(1, R / C)) U.

    Parameters are matrices, whole or sharded by rows. State: the momentum buffer, this rank's rows, allocated at once.
    ``step`` uses up the gradients' memory.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        learning_rate: float,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(groups, {"lr": learning_rate, "momentum": momentum, "weight_decay": 0.0})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(local(parameter.detach()))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; under shards every rank calls it."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            updates = [local(parameter.grad) for parameter in parameters]
            torch._foreach_lerp_(buffers, updates, 1 - group["momentum"])
            torch._foreach_lerp_(updates, buffers, group["momentum"])
            rate = group["lr"]
            torch._foreach_mul_([local(parameter) for parameter in parameters], 1 - rate * group["weight_decay"])
            for parameter, direction in _orthogonalized_rows(parameters):
                rows, columns = parameter.shape
                local(parameter).add_(direction, alpha=-rate * math.sqrt(max(1, rows / columns)))


def orthogonalized(matrix_RC: Tensor) -> Tensor:
    """About U V^T of the singular value decomposition U S V^T, by five quintic Newton-Schulz steps.

    The coefficients are Jordan's: they bring singular values near 1 (0.7 to 1.2) fast rather than exactly.
    """
    a, b, c = _COEFFICIENTS
    x = matrix_RC
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _orthogonalized_rows(parameters: list[Tensor]) -> Iterable[tuple[Tensor, Tensor]]:
    """(parameter, this rank's rows of the orthogonalized gradient) for each."""
    for group, members in by_shard_group(parameters):
        if group is None:
            yield from ((parameter, orthogonalized(_update(parameter))) for parameter in members)
        else:
            yield from zip(members, _exchange(members, group), strict=True)


def _update(parameter: Tensor) -> Tensor:
    """This rank's rows of what is to be made orthogonal, in the type to iterate in."""
    assert parameter.grad is not None
    update = local(parameter.grad)
    return update.bfloat16() if update.is_cuda else update


def _exchange(parameters: list[Tensor], group: dist.ProcessGroup) -> list[Tensor]:
    """Each matrix is put together on one rank of ``group``, orthogonalized there and dealt out again.

    Two exchanges, in the type of the iteration, move each element once there and once back, and no rank holds more than
    its share of the matrices.
    """
    ranks, me = dist.get_world_size(group), dist.get_rank(group)
    owners = share_out([tuple(parameter.shape) for parameter in parameters], ranks)
    order = sorted(range(len(parameters)), key=lambda index: owners[index])
    mine = [index for index in order if owners[index] == me]
    rows = [rows_by_rank(parameter.shape[0], ranks) for parameter in parameters]

    def elements(index: int, rank: int) -> int:
        return rows[index][rank] * parameters[index].shape[1]

    out = [sum(elements(index, me) for index in order if owners[index] == rank) for rank in range(ranks)]
    back = [sum(elements(index, rank) for index in mine) for rank in range(ranks)]
    shards = [_update(parameters[index]).flatten() for index in order]
    received = _all_to_all(torch.cat(shards), out, back, group)

    pieces = received.split([elements(index, rank) for rank in range(ranks) for index in mine])
    answers: list[list[Tensor]] = [[] for _ in range(ranks)]
    for position, index in enumerate(mine):
        matrix_RC = torch.cat(pieces[position :: len(mine)]).view(parameters[index].shape)
        for rank, part in enumerate(orthogonalized(matrix_RC).split(rows[index])):
            answers[rank].append(part.flatten())
    sent = torch.cat([part for parts in answers for part in parts]) if mine else received
    returned = _all_to_all(sent, back, out, group).split([elements(index, me) for index in order])

    directions = dict(zip(order, returned, strict=True))
    return [directions[index].view(local(parameter).shape) for index, parameter in enumerate(parameters)]


def _all_to_all(values: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    output = values.new_empty(sum(received))
    dist.all_to_all_single(output, values, received, sent, group=group)
    return output


def share_out(shapes: list[tuple[int, ...]], ranks: int) -> list[int]:
    """A rank for each matrix, so that all have about the same work: the costliest first, to whoever has least."""
    costs = [min(shape) ** 2 * max(shape) for shape in shapes]
    load, owners = [0] * ranks, [0] * len(shapes)
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owners[index] = load.index(min(load))
        load[owners[index]] += costs[index]
    return owners
