"""Memory comes back when the last view of an array has gone, and not before."""

import gc
from collections.abc import Callable

import numpy as np
import pytest
import torch

from coca.reused_memory import Memory, ReusedMemory, own_memory
from coca.shared_memory import SharedMemory

SHAPE = (4, 5, 5, 3)


def array_of(memory: ReusedMemory, count: int = 4) -> np.ndarray:
    array, piece = memory.array((count, *SHAPE[1:]))
    assert piece.size == array.nbytes
    return array


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_is_used_again_and_only_for_its_size() -> None:
    memory = ReusedMemory()
    first = array_of(memory)
    assert (first.shape, first.dtype, first.flags.writeable) == (SHAPE, np.uint8, True)
    second, where = array_of(memory), address(first)
    assert address(second) != where
    del first
    third = array_of(memory)
    assert address(third) == where
    del third
    assert array_of(memory, 2).shape == (2, 5, 5, 3)
    assert array_of(memory, 0).shape == (0, 5, 5, 3)


VIEWS: dict[str, Callable[[np.ndarray], object]] = {
    "slice of a slice": lambda array: array[1:][1:],
    "transposed": lambda array: array.transpose(0, 3, 1, 2)[:, 1:],
    "tensor": lambda array: torch.from_numpy(array),
    "view of a tensor": lambda array: torch.from_numpy(array[1:])[1:].permute(0, 3, 1, 2),
    "buffer": lambda array: memoryview(array)[1:],
    "array of a tensor": lambda array: torch.from_numpy(array)[2:].numpy(),
}


@pytest.mark.parametrize("make", [own_memory, SharedMemory])
@pytest.mark.parametrize("name", VIEWS)
def test_a_view_keeps_its_memory(name: str, make: Callable[[int], Memory]) -> None:
    memory = ReusedMemory(make)
    array = array_of(memory)
    array[:] = 7
    view = VIEWS[name](array)
    del array
    gc.collect()
    others = [array_of(memory) for _ in range(3)]
    for other in others:
        other[:] = 1
    assert (np.asarray(view) == 7).all()
    del view
    gc.collect()
    assert len(memory._free) == 1


def test_little_is_kept() -> None:
    memory = ReusedMemory(most=2)
    arrays = [array_of(memory) for _ in range(5)]
    assert len({address(array) for array in arrays}) == 5
    del arrays
    assert len(memory._free) == 2
