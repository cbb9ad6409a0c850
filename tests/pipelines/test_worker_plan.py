"""How many workers a cluster carries, and what is left to Ray Data."""

import pytest

from coca.errors import BadInput
from pipelines.fetch_config import FetchConfig
from pipelines.worker_plan import plan_workers


@pytest.mark.parametrize(
    ("settings", "parts", "cpus", "planned"),
    [
        ({}, 100, 16, (4, 3.5)),
        ({}, 100, 4, (1, 3.5)),
        ({}, 100, 2, (1, 1.5)),
        ({}, 2, 64, (2, 4.0)),
        ({"decode_processes": 1}, 100, 16, (8, 1.5)),
        ({"workers": 3}, 100, 4, (3, 1.0)),
    ],
)
def test_workers_leave_ray_data_a_cpu(
    settings: dict[str, int], parts: int, cpus: float, planned: tuple[int, float]
) -> None:
    assert plan_workers(FetchConfig(**settings), parts, cpus) == planned


def test_a_cluster_too_small_for_the_workers_is_told() -> None:
    with pytest.raises(BadInput, match=r"fetch\.workers = 9 .*the Ray cluster has 4.*Set fetch\.workers to 7 or fewer"):
        plan_workers(FetchConfig(workers=9), 100, 4)
