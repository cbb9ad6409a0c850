"""What training needs from other ranks. In a single process every function gives back what it was given.

Shapes: N local rows, G global rows (all ranks' rows, by rank).
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather_rows(local: Tensor) -> Tensor:
    """All ranks' rows (N, ...) as one tensor (G, ...), without gradient. Ranks hold equally many rows."""
    local = local.detach()
    if world_size() == 1:
        return local
    parts = [torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, local.contiguous())
    return torch.cat(parts)


def reduce_to_owner(value: Tensor, owner: int) -> None:
    """Replaces ``value`` on the rank ``owner`` by the sum of every rank's; what it holds elsewhere is undefined."""
    if world_size() > 1:
        dist.reduce(value, dst=owner)


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's ``value``, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value)
    return value


def max_over_ranks(value: Tensor) -> Tensor:
    """The largest of every rank's ``value``, entry by entry, without gradient."""
    value = value.detach().clone()
    if world_size() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
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
