"""How many CPUs this process may use."""

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def usable_cpus(cgroup: Path = _CGROUP) -> int:
    """Those that it may run on, or as many as its container's quota comes to where that is less.

    Kubernetes limits a pod by quota and leaves all CPUs of the node in sight.
    """
    return max(1, min(len(os.sched_getaffinity(0)), _quota(cgroup)))


def _quota(cgroup: Path) -> int:
    """CPUs of the container's quota, rounded up; as many as you like where there is none."""
    for read in (_quota_v2, _quota_v1):
        try:
            quota, period = read(cgroup)
        except (OSError, ValueError):
            continue
        return math.ceil(quota / period)
    return 2**31


def _quota_v2(cgroup: Path) -> tuple[int, int]:
    """Microseconds of CPU time in a period of so many; ValueError where there is no limit, which is ``max``."""
    quota, period = (cgroup / "cpu.max").read_text().split()
    return int(quota), int(period)


def _quota_v1(cgroup: Path) -> tuple[int, int]:
    quota, period = (int((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
    if quota < 0:
        raise ValueError
    return quota, period
