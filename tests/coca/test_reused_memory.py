"""Memory comes back when the last view of an array has gone, and not before."""

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from coca.reused_memory import ReusedMemory

SHAPE = (4, 5, 5, 3)


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_and_only_for_its_size() -> None:
    memory = ReusedMemory()
    first = memory.array(SHAPE)
    assert (first.shape, first.dtype, first.flags.writeable) == (SHAPE, np.uint8, True)
    second, where = memory.array(SHAPE), address(first)
    assert address(second) != where
    del first
    third = memory.array(SHAPE)
    assert address(third) == where
    del third
    assert memory.array((2, 5, 5, 3)).shape == (2, 5, 5, 3)
    assert memory.array((0, 5, 5, 3)).shape == (0, 5, 5, 3)


VIEWS: dict[str, Callable[[np.ndarray], object]] = {
    "slice of a slice": lambda array: array[1:][1:],
    "transposed": lambda array: array.transpose(0, 3, 1, 2)[:, 1:],
    "tensor": lambda array: torch.from_numpy(array),
    "view of a tensor": lambda array: torch.from_numpy(array[1:])[1:].permute(0, 3, 1, 2),
    "buffer": lambda array: memoryview(array)[1:],
    "array of a tensor": lambda array: torch.from_numpy(array)[2:].numpy(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_keeps_its_memory(name: str) -> None:
    memory = ReusedMemory()
    array = memory.array(SHAPE)
    array[:] = 7
    view = VIEWS[name](array)
    del array
    gc.collect()
    others = [memory.array(SHAPE) for _ in range(3)]
    for other in others:
        other[:] = 1
    assert (np.asarray(view) == 7).all()
    del view
    gc.collect()
    assert len(memory._free) == 1


def test_little_is_kept() -> None:
    memory = ReusedMemory(most=2)
    arrays = [memory.array(SHAPE) for _ in range(5)]
    assert len({address(array) for array in arrays}) == 5
    del arrays
    assert len(memory._free) == 2
