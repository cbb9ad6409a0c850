"""serving/app.py: the application on Ray Serve, over real HTTP. One deployment serves the whole module."""

import asyncio
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from ray import serve

from coca.errors import BadInput, RunFailed
from jobs.cluster import ClusterInfo
from serving import app
from serving.api_errors import ApiError
from serving.config import ServeConfig
from serving.engine import Engine
from serving.results import Caption

pytestmark = pytest.mark.ray

MAX_BATCH = 8


@pytest.fixture(scope="module")
def config(checkpoint: str) -> ServeConfig:
    return ServeConfig(
        checkpoint=checkpoint,
        port=0,
        max_batch_size=MAX_BATCH,
        batch_wait_ms=300,  # a full batch does not wait; this is for machines that are slow to send one
        max_image_bytes=100_000,
        max_body_bytes=300_000,
        cpus_per_replica=0.5,
    )


@pytest.fixture(scope="module")
def service(ray_cluster: ClusterInfo, config: ServeConfig) -> Iterator[app.Service]:
    yield app.deploy(config)
    app.shutdown()


@pytest.fixture
def http(service: app.Service) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="module")
def expected(checkpoint: str, images: list[bytes]) -> list[str]:
    captions = Engine(checkpoint).caption(images)
    return [caption.text for caption in captions if isinstance(caption, Caption)]


def test_captions_are_the_engines(
    http: httpx.Client, images: list[bytes], expected: list[str], to_data_uri: Callable[[bytes], str]
) -> None:
    upload = http.post("/v1/caption", files=[("image", image) for image in images])
    encoded = http.post("/v1/caption", json={"images": [to_data_uri(image) for image in images]})
    for response in (upload, encoded):
        assert response.status_code == 200, response.text
        assert [item["caption"] for item in response.json()["data"]] == expected


def test_embeddings_are_unit_vectors_in_order(
    http: httpx.Client, config: ServeConfig, images: list[bytes], to_data_uri: Callable[[bytes], str]
) -> None:
    response = http.post("/v1/embeddings", json={"input": ["a red circle", to_data_uri(images[0]), "a star"]})
    got = np.array([item["embedding"] for item in response.json()["data"]])
    engine = Engine(config.checkpoint)
    wanted = [*engine.embed_texts(["a red circle"]), *engine.embed_images(images[:1]), *engine.embed_texts(["a star"])]
    assert got.shape == (3, engine.info.embedding_dim)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(got, [item.vector for item in wanted], atol=1e-5)  # type: ignore[union-attr]


def test_concurrent_requests_share_batches_and_a_bad_one_hurts_nobody(
    service: app.Service, images: list[bytes], expected: list[str]
) -> None:
    async def post(client: httpx.AsyncClient, data: bytes) -> httpx.Response:
        return await client.post("/v1/caption", files={"image": data})

    async def crowd() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=service.url, timeout=30, limits=limits) as client:
            sent = [images[i % len(images)] if i % 5 else b"broken" for i in range(40)]
            return await asyncio.gather(*(post(client, data) for data in sent))

    responses = asyncio.run(crowd())
    for i, response in enumerate(responses):
        if i % 5:
            assert response.json()["data"][0]["caption"] == expected[i % len(images)]
        else:
            assert (response.status_code, response.json()["error"]["code"]) == (400, "not_an_image")
    sizes = [int(response.headers["x-batch-size"]) for i, response in enumerate(responses) if i % 5]
    assert max(sizes) == MAX_BATCH
    assert np.mean(sizes) > MAX_BATCH / 2


def test_bad_requests_get_a_cause_and_the_service_stays_up(http: httpx.Client, images: list[bytes]) -> None:
    refused = [
        (http.post("/v1/caption", files={"image": b"no"}), 400, "not_an_image"),
        (http.post("/v1/caption", files={"image": images[0][:100]}), 400, "truncated_image"),
        (http.post("/v1/caption", files={"image": bytes(100_001)}), 413, "image_too_large"),
        (http.post("/v1/caption", files={"image": bytes(5_000_000)}), 413, "body_too_large"),
        (http.post("/v1/caption", content=(bytes(50_000) for _ in range(20))), 413, "body_too_large"),
        (http.post("/v1/caption", json={"image": "http://a/b.png"}), 400, "url_not_fetched"),
        (http.post("/v1/embeddings", json={"input": []}), 400, "empty_input"),
        (http.post("/v1/embeddings", json={"input": "word " * 100}), 400, "text_too_long"),
        (http.post("/v1/embeddings", json={"input": "a", "model": "other"}), 404, "model_not_found"),
        (http.get("/nowhere"), 404, "no_such_route"),
    ]
    for response, status, code in refused:
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert http.post("/v1/caption", files={"image": images[0]}).status_code == 200


def test_health_docs_and_version(http: httpx.Client, service: app.Service) -> None:
    health = http.get("/healthz")
    assert (health.status_code, health.json()["version"]) == (200, service.info.version)
    assert http.get("/docs").status_code == 200
    assert "/v1/embeddings" in http.get("/openapi.json").json()["paths"]
    assert http.get("/v1/models").json()["data"][0]["version"] == service.info.version


class FailingModel:
    async def check(self) -> None:
        raise RunFailed("the embedding of a grey image has length nan, not 1")


def test_a_model_that_fails_its_check_is_unavailable(service: app.Service) -> None:
    deployment = serve.deployment(name="Failing", ray_actor_options={"num_cpus": 0.1})(FailingModel)
    handle = serve.run(deployment.bind(), name="failing", route_prefix=None)
    with pytest.raises(ApiError) as caught:
        asyncio.run(app.ReplicaClient(handle).check())
    assert (caught.value.status, caught.value.code) == (503, "model_unavailable")


def test_a_second_service_on_the_cluster_is_refused(service: app.Service, config: ServeConfig) -> None:
    with pytest.raises(BadInput, match="already runs on this cluster"):
        app.deploy(config)


def test_a_taken_port_is_refused(config: ServeConfig) -> None:
    with socket.create_server(("127.0.0.1", 0), reuse_port=True) as other:
        port = other.getsockname()[1]
        with pytest.raises(BadInput, match=f"port {port} on 127.0.0.1 is taken"):
            app.prepare(config.model_copy(update={"port": port}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"replicas": 5}, "5 replicas need 2.6 CPUs, and there are 2"), ({"gpus_per_replica": 1}, "need 1 GPUs")],
)
def test_what_cannot_be_scheduled_is_refused(config: ServeConfig, changes: dict[str, int], told: str) -> None:
    app.refuse_too_large(config, cpus=0.6, gpus=0)
    with pytest.raises(BadInput, match=told):
        app.refuse_too_large(config.model_copy(update=changes), cpus=2, gpus=0)


def test_a_run_folder_means_its_newest_checkpoint(config: ServeConfig, tmp_path: Path) -> None:
    for step in (3, 10):
        folder = tmp_path / "checkpoints" / f"step_{step:09d}"
        folder.mkdir(parents=True)
        for file in Path(config.checkpoint).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    plan = app.prepare(config.model_copy(update={"checkpoint": str(tmp_path)}))
    assert plan.config.checkpoint.endswith("checkpoints/step_000000010")
    assert plan.config.port > 0


def test_a_broken_checkpoint_is_refused(config: ServeConfig, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="not a checkpoint"):
        app.prepare(config.model_copy(update={"checkpoint": str(tmp_path)}))
