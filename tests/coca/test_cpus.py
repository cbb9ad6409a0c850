"""CPUs by affinity and by a container's quota."""

import os
from pathlib import Path

import pytest

from coca.cpus import usable_cpus

HERE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, HERE),
        ({"cpu.max": "max 100000"}, HERE),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "110000 100000"}, min(2, HERE)),
        ({"cpu.max": f"{(HERE + 3) * 100_000} 100000"}, HERE),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, HERE),
        ({"cpu/cpu.cfs_quota_us": "90000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
    ids=str,
)
def test_the_quota_counts_where_it_is_less(tmp_path: Path, files: dict[str, str], cpus: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cpus(tmp_path) == cpus


def test_no_more_than_the_process_may_run_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3})
    assert usable_cpus(tmp_path) == 1
