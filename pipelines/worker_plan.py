"""How many fetching actors a cluster carries."""

import math

from coca.errors import BadInput
from pipelines.fetch_config import FetchConfig


def plan_workers(config: FetchConfig, parts: int, cpus: float) -> tuple[int, float]:
    """How many fetching actors, and CPUs for each; half a CPU at least stays free for Ray Data's own tasks.

    An actor keeps one CPU busy with its connections and one more with each of its decoding processes.

    Raises:
        BadInput: the cluster is too small for the number that is asked for.
    """
    wanted = 1 + config.decode_processes
    workers = min(config.workers or max(1, int(cpus // wanted)), parts)
    free_cpus = cpus - 0.5
    if free_cpus < 0.5 * workers:
        raise BadInput(
            f"fetch.workers = {workers} leaves no CPU for Ray Data: the Ray cluster has {cpus:g}",
            f"Set fetch.workers to {int(free_cpus / 0.5)} or fewer" if free_cpus >= 0.5 else "Give Ray 1 CPU or more",
        )
    return workers, min(float(wanted), math.floor(2 * free_cpus / workers) / 2)
