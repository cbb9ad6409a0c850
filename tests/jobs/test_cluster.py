import os

import pytest

from coca.errors import BadInput
from coca.storage import Store
from jobs.cluster import ClusterInfo, connect

pytestmark = pytest.mark.ray


def test_local_ray_asks_for_a_token_and_shows_its_dashboard_to_this_machine_only(ray_cluster: ClusterInfo):
    import requests

    assert ray_cluster.started_here
    assert (ray_cluster.cpus, ray_cluster.nodes) == (4, 1)
    assert ray_cluster.dashboard_url.startswith("http://127.0.0.1:")
    url = f"{ray_cluster.dashboard_url}/api/jobs/"
    assert requests.get(url, timeout=10).status_code == 401
    token = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"}
    assert requests.get(url, headers=token, timeout=10).status_code == 200


def test_connect_again_is_the_same_cluster(ray_cluster: ClusterInfo):
    assert connect() is ray_cluster


def test_workers_reach_the_s3_server_of_the_session(ray_cluster: ClusterInfo, s3: str):
    import ray

    @ray.remote
    def write(store: Store) -> tuple[bool, bool]:
        return store.write_once("a", b"1"), store.write_once("a", b"2")

    assert ray.get(write.remote(Store(s3))) == (True, False)
    assert Store(s3).read("a") == b"1"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1: .*refused. Start that cluster, or unset"),
        ("http://127.0.0.1:8265", "is a dashboard: .* Put `coca submit --` before the command"),
    ],
)
def test_an_address_that_cannot_be_joined_is_bad_input(address: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("jobs.cluster._connected", None)
    with pytest.raises(BadInput, match=message):
        connect()
