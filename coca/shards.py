"""The part of a parameter that lies on this rank: all of it, or some rows of a DTensor.

FSDP2 shards dim 0 and deals the rows as ``torch.chunk`` does: the first ranks hold ceil(rows / ranks) each, the next
one what is left, the last ones nothing. Vectors and scalars lie whole (`coca.parallel`). Arithmetic on the parts, with
the few sums over ranks written out, costs none of the dispatch of DTensors, and mixes with whole parameters in one
foreach operation.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient, sharing its memory."""
    # to_local() would go through autograd; FSDP2 itself reads and replaces this attribute.
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: Tensor, part: Tensor) -> Tensor:
    """``part``, this rank's rows of something that has a row for each of the parameter's, sharded as the parameter is.

    It shares memory with ``part``, which it is itself where the parameter lies whole on this rank.
    """
    if not isinstance(parameter, DTensor):
        return part
    shape = torch.Size((parameter.shape[0], *part.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )


def shard_group(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that together hold one copy of the parameter, in the order of its rows; None where it lies whole."""
    if not isinstance(parameter, DTensor):
        return None
    sharded = [dim for dim, placement in enumerate(parameter.placements) if placement.is_shard()]
    assert all(parameter.placements[dim].is_shard(0) for dim in sharded), parameter.placements
    assert len(sharded) <= 1, parameter.placements
    return parameter.device_mesh.get_group(sharded[0]) if sharded else None


def by_shard_group(parameters: Iterable[Tensor]) -> list[tuple[dist.ProcessGroup | None, list[Tensor]]]:
    """The parameters by ``shard_group``, groups and parameters in the order they come, which is that of all ranks."""
    found: dict[str | None, tuple[dist.ProcessGroup | None, list[Tensor]]] = {}
    for parameter in parameters:
        group = shard_group(parameter)
        found.setdefault(None if group is None else group.group_name, (group, []))[1].append(parameter)
    return list(found.values())


def rows_by_rank(rows: int, ranks: int) -> list[int]:
    """How many of ``rows`` each rank holds."""
    chunk = -(-rows // ranks)
    return [max(0, min(chunk, rows - chunk * rank)) for rank in range(ranks)]
