"""Counters by reason: nothing without Ray, and in the node's own Prometheus text with it."""

import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from coca.contract import Reason
from pipelines.metrics import FetchMetrics

ROOT = Path(__file__).parents[2]


def test_without_ray_nothing_is_counted_and_ray_is_not_imported() -> None:
    code = (
        "import sys\n"
        "from pipelines.metrics import FetchMetrics\n"
        "metrics = FetchMetrics()\n"
        "metrics.count(None, requests=1, bytes=10)\n"
        "with metrics.time('fetch'): pass\n"
        "assert 'ray' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_stage_that_fails_fails_on() -> None:
    with pytest.raises(KeyError), FetchMetrics().time("fetch"):
        raise KeyError


@pytest.mark.ray
def test_the_node_exports_what_an_actor_counted(ray_cluster: object) -> None:
    import ray

    @ray.remote(num_cpus=0)
    class Fetcher:
        def fetch(self) -> str:
            metrics = FetchMetrics()
            metrics.count(None, requests=1, bytes=1000)
            metrics.count(Reason.NOT_FOUND, requests=2)
            metrics.count_many({None: 2, Reason.NOT_FOUND: 1, Reason.TIMEOUT: 0}, requests=5, bytes=500)
            with metrics.time("fetch"):
                pass
            return ray.get_runtime_context().get_worker_id()

    fetcher = Fetcher.remote()
    worker = ray.get(fetcher.fetch.remote())
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    last, deadline_s = "ray_coca_refresh_stage_seconds_count{fetch}", time.monotonic() + 60
    while last not in (found := exported(url, worker)) and time.monotonic() < deadline_s:
        time.sleep(0.5)
    assert found["ray_coca_fetch_links_total{ok}"] == 3
    assert found["ray_coca_fetch_links_total{not_found}"] == 2
    assert found["ray_coca_fetch_requests_total{}"] == 8
    assert found["ray_coca_fetch_bytes_total{}"] == 1500
    assert found[last] == 1
    assert "ray_coca_fetch_links_total{timeout}" not in found
    ray.kill(fetcher)


def exported(url: str, worker: str) -> dict[str, float]:
    """What the node exports of one worker: name{the value of our own label}."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found = {}
    for name, labels, value in re.findall(r"^(ray_coca_\w+)\{(.*)\} (\S+)$", text, re.M):
        if f'WorkerId="{worker}"' in labels:
            own = re.search(r'\b(?:reason|stage)="(\w+)"', labels)
            found[f"{name}{{{own[1] if own else ''}}}"] = float(value)
    return found
