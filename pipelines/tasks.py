"""A function over many items: here where there are few, as a Ray Data job where there are more."""

import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

StartRay = Callable[[], object]

# So few items cost less here than a job costs to start.
IN_PROCESS_ITEMS = 4


def run_tasks(
    function: Callable[[Item], Result], items: Sequence[Item], *, start_ray: StartRay | None = None
) -> list[Result]:
    """``function`` of each item, results in the order of the items.

    Results travel between processes as JSON: names and counts, no rows.

    Args:
        start_ray: called before the first task; without it, all run in this process.
    """
    if start_ray is None or len(items) <= IN_PROCESS_ITEMS:
        return [function(item) for item in items]
    import ray.data

    from pipelines.ray_data import quiet_ray_data

    start_ray()

    def one(row: dict[str, Any]) -> dict[str, Any]:
        return {"place": row["place"], "result": json.dumps(function(items[row["place"]]))}

    with quiet_ray_data():
        places = ray.data.from_items([{"place": place} for place in range(len(items))], override_num_blocks=len(items))
        rows = places.map(one).take_all()
    by_place = {row["place"]: json.loads(row["result"]) for row in rows}
    return [by_place[place] for place in range(len(items))]
