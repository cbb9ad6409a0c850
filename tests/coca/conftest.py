"""What several tests of the model on many ranks share."""

from collections.abc import Iterator

import pytest
import torch

from tests.coca.processes import Processes


@pytest.fixture(scope="session")
def processes() -> Iterator[Processes]:
    """Gloo processes for functions that run on several ranks; started once, since each imports torch."""
    with Processes() as started:
        yield started


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the processes: more threads would only wait for one another, and sums would have another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
