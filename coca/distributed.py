"""What the losses need from other ranks. Every function is the identity in a single process.

Shapes: N local rows, G global rows (all ranks' rows, by rank), E embedding.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, local_NE: Tensor) -> Tensor:
        parts = [torch.empty_like(local_NE) for _ in range(world_size())]
        dist.all_gather(parts, local_NE.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: object, grad_GE: Tensor) -> Tensor:
        # Every rank's loss depends on our rows: their gradients add up.
        grad_GE = grad_GE.contiguous()
        dist.all_reduce(grad_GE)
        return grad_GE.chunk(world_size())[rank()]


def gather(local_NE: Tensor) -> Tensor:
    """All ranks' rows (G, E), with gradients flowing back to the rank that owns them. Ranks hold equally many rows."""
    return _Gather.apply(local_NE) if world_size() > 1 else local_NE


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's ``value``, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def all_gather_list(values: list[int]) -> list[list[int]]:
    """Every rank's list of 64-bit integers, by rank; ranks give equally many."""
    if world_size() == 1:
        return [values]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    mine = torch.tensor(values, dtype=torch.int64, device=device)
    parts = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(parts, mine)
    return [part.tolist() for part in parts]
