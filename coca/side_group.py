"""A process group of one's own, for what must not get between the collectives of the training."""

from typing import Any, Self

import torch
import torch.distributed as dist

from coca.distributed import rank, world_size


class SideGroup:
    """All ranks over gloo, whatever the training communicates by; in a single process it does nothing.

    Making one is collective.
    """

    def __init__(self) -> None:
        self.group: dist.ProcessGroup | None = dist.new_group(backend="gloo") if world_size() > 1 else None
        self.rank, self.size = rank(), world_size()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; values are pickled."""
        if self.group is None:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        if self.group is None:
            return flag
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.group)
        return bool(flags.item())

    def close(self) -> None:
        if self.group is not None and dist.is_initialized():
            dist.destroy_process_group(self.group)
        self.group = None
