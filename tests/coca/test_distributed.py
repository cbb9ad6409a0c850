"""What ranks tell one another, on one, two and four processes."""

from typing import Any

import pytest
import torch

from coca.distributed import (
    all_gather_list,
    gather_rows,
    max_over_ranks,
    rank,
    reduce_to_owner,
    sum_over_ranks,
    world_size,
)
from tests.coca.processes import Processes


def everything() -> dict[str, Any]:
    """Rank r gives r + 1, in forms of all kinds."""
    mine = torch.full((2, 3), float(rank() + 1), requires_grad=True)
    owned = mine.detach().clone()
    reduce_to_owner(owned, world_size() - 1)
    rows = gather_rows(mine.T.contiguous().T)  # not contiguous
    given = {
        "rows": rows[:, 0].tolist(),
        "sum": sum_over_ranks(mine)[0, 0].item(),
        "max": max_over_ranks(mine)[0, 0].item(),
        "owned": owned[0, 0].item() if rank() == world_size() - 1 else None,
        "lists": all_gather_list([rank(), 1 << 62]),
        "gradient": rows.requires_grad or sum_over_ranks(mine).requires_grad,
        "unchanged": mine[0, 0].item(),
    }
    return {"rank": rank(), **given}


def expected(rank: int, world: int) -> dict[str, Any]:
    total = world * (world + 1) / 2
    return {
        "rank": rank,
        "rows": [float(other + 1) for other in range(world) for _ in range(2)],
        "sum": total,
        "max": float(world),
        "owned": total if rank == world - 1 else None,
        "lists": [[other, 1 << 62] for other in range(world)],
        "gradient": False,
        "unchanged": float(rank + 1),
    }


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_hear_of_one_another(processes: Processes, world: int) -> None:
    assert processes.run(world, everything) == [expected(rank, world) for rank in range(world)]


def test_without_a_process_group_everything_comes_back() -> None:
    with torch.no_grad():
        assert everything() == expected(0, 1)
