"""A function over many items, here and as a Ray Data job: the same results in the same order."""

from functools import partial
from typing import Any

import pytest

from pipelines.tasks import run_tasks


def describe(item: int, *, factor: int) -> dict[str, Any]:
    return {"item": item, "times": item * factor, "list": [item] * 2}


EXPECTED = [{"item": n, "times": 3 * n, "list": [n, n]} for n in range(7)]


def test_one_process() -> None:
    assert run_tasks(partial(describe, factor=3), list(range(7))) == EXPECTED
    assert run_tasks(partial(describe, factor=3), []) == []


@pytest.mark.ray
def test_a_ray_data_job_gives_the_same(ray_cluster: Any) -> None:
    started: list[bool] = []
    results = run_tasks(partial(describe, factor=3), list(range(7)), start_ray=lambda: started.append(True))
    assert results == EXPECTED
    assert started == [True]
    assert run_tasks(partial(describe, factor=3), [5, 6], start_ray=lambda: started.append(True)) == EXPECTED[5:]
    assert started == [True]  # few items need no Ray
