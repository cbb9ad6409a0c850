"""Values of all ranks, beside the training's own collectives."""

import threading

import torch
import torch.distributed as dist

from coca.side_group import SideGroup
from tests.coca.rank_processes import run_phases


def test_a_single_process_needs_no_group() -> None:
    with SideGroup() as side:
        assert (side.group, side.rank, side.size, side.gather("x"), side.any(True), side.any(False)) == (
            None, 0, 1, ["x"], True, False,
        )  # fmt: skip


def gather() -> None:
    with SideGroup() as side:
        assert side.gather({"rank": side.rank}) == [{"rank": n} for n in range(side.size)]
        assert side.any(side.rank == 1)
        assert not side.any(False)


def stay_apart() -> None:
    """A thread gathers while the training reduces, in an order that differs from rank to rank."""
    with SideGroup() as side:
        gathered: list[list[int]] = []
        thread = threading.Thread(target=lambda: gathered.extend(side.gather(n) for n in range(50)))
        thread.start()
        for n in range(50):
            total = torch.tensor([float(n)])
            dist.all_reduce(total)
            assert total.item() == n * side.size
        thread.join()
        assert gathered == [[n] * side.size for n in range(50)]


def test_ranks() -> None:
    run_phases(__name__, [("gather", 3), ("stay_apart", 2)])
