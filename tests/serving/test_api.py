"""serving/api.py over a real engine, without Ray: routes, limits, errors, health."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import numpy as np
import pytest

from serving.api import create_api
from serving.api_errors import ApiError, unavailable
from serving.config import ServeConfig
from serving.engine import Engine
from serving.results import Caption, Embedding, Refusal


class EngineClient:
    """The engine in this process; `gate` holds every answer back, `failure` replaces it."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.checks = engine, 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.failure: Exception | None = None

    async def _pass(self) -> None:
        await self.gate.wait()
        if self.failure is not None:
            raise self.failure

    async def caption(self, images: list[bytes]) -> list[Caption | Refusal]:
        await self._pass()
        return self.engine.caption(images)

    async def embed(self, inputs: list[str | bytes]) -> list[Embedding | Refusal]:
        await self._pass()
        embed = self.engine
        return [
            (embed.embed_texts([item]) if isinstance(item, str) else embed.embed_images([item]))[0] for item in inputs
        ]

    async def check(self) -> None:
        self.checks += 1
        await self._pass()
        self.engine.check()


@pytest.fixture(scope="module")
def engine(checkpoint: str) -> Engine:
    return Engine(checkpoint)


@pytest.fixture
def config(checkpoint: str) -> ServeConfig:
    return ServeConfig(
        checkpoint=checkpoint,
        max_inputs_per_request=4,
        max_pending_inputs=6,
        max_image_bytes=20_000,
        max_body_bytes=60_000,
        request_timeout_s=5,
        health_interval_s=0.2,
        health_timeout_s=0.3,
    )


def http_client(config: ServeConfig, model: EngineClient) -> httpx.AsyncClient:
    api = create_api(config, model.engine.info, model)
    transport = httpx.ASGITransport(api, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://service")


def run(config: ServeConfig, engine: Engine, talk: Callable[[httpx.AsyncClient, EngineClient], Any]) -> Any:
    async def conversation() -> Any:
        model = EngineClient(engine)
        async with http_client(config, model) as client:
            return await talk(client, model)

    return asyncio.run(conversation())


def error_of(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def test_uploads_and_base64_get_the_same_captions(
    config: ServeConfig, engine: Engine, images: list[bytes], to_data_uri: Callable[[bytes], str]
) -> None:
    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        files = [("image", (f"{i}.bin", image)) for i, image in enumerate(images[:3])]
        upload = await client.post("/v1/caption", files=files, data={"model": "coca"})
        listed = await client.post("/v1/caption", json={"images": [to_data_uri(image) for image in images[:3]]})
        single = await client.post("/v1/caption", json={"image": to_data_uri(images[0]).partition(",")[2]})
        expected = [result.text for result in engine.caption(images[:3]) if isinstance(result, Caption)]
        for response in (upload, listed):
            assert response.status_code == 200
            assert [item["caption"] for item in response.json()["data"]] == expected
            assert [item["index"] for item in response.json()["data"]] == [0, 1, 2]
        assert [item["caption"] for item in single.json()["data"]] == expected[:1]
        assert upload.headers["x-model-version"] == engine.info.version

    run(config, engine, talk)


def test_embeddings_mix_texts_and_images_in_order(
    config: ServeConfig, engine: Engine, images: list[bytes], to_data_uri: Callable[[bytes], str]
) -> None:
    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        inputs = ["a red circle", to_data_uri(images[0]), {"image": to_data_uri(images[1])}, {"text": "star"}]
        body = (await client.post("/v1/embeddings", json={"input": inputs, "model": "coca"})).json()
        got = np.array([item["embedding"] for item in body["data"]])
        texts = [e.vector for e in engine.embed_texts(["a red circle", "star"]) if isinstance(e, Embedding)]
        pictures = [e.vector for e in engine.embed_images(images[:2]) if isinstance(e, Embedding)]
        np.testing.assert_allclose(got, [texts[0], *pictures, texts[1]], atol=1e-5)
        tokens = len(engine.tokens("a red circle")) + len(engine.tokens("star"))  # type: ignore[arg-type]
        assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}

    run(config, engine, talk)


def embed_body(value: Any, **more: Any) -> dict[str, Any]:
    return {"url": "/v1/embeddings", "json": {"input": value, **more}}


JSON = {"content-type": "application/json"}
REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"url": "/v1/caption", "files": {"image": b"GIF but no"}}, 400, "not_an_image"),
    ({"url": "/v1/caption", "files": {"image": b""}}, 400, "not_an_image"),
    ({"url": "/v1/caption", "files": {"image": "TRUNCATED"}}, 400, "truncated_image"),
    ({"url": "/v1/caption", "files": {"image": bytes(20_001)}}, 413, "image_too_large"),
    ({"url": "/v1/caption", "files": {"image": bytes(60_001)}}, 413, "body_too_large"),
    ({"url": "/v1/caption", "files": {"picture": b"x"}}, 400, "unknown_field"),
    ({"url": "/v1/caption", "files": [("image", b"x")] * 5}, 400, "too_many_inputs"),
    ({"url": "/v1/caption", "files": [("image", b"x")] * 9}, 400, "invalid_request"),
    ({"url": "/v1/caption", "files": {"image": (None, "text")}}, 400, "not_a_file"),
    (
        {"url": "/v1/caption", "content": b"x", "headers": {"content-type": "multipart/form-data"}},
        400,
        "invalid_request",
    ),
    (
        {"url": "/v1/caption", "content": b"\xff\xd8", "headers": {"content-type": "image/jpeg"}},
        415,
        "unsupported_media_type",
    ),
    ({"url": "/v1/caption", "content": b"{", "headers": JSON}, 400, "invalid_json"),
    ({"url": "/v1/caption", "json": {"image": "https://a/b.png"}}, 400, "url_not_fetched"),
    ({"url": "/v1/caption", "json": {"image": "%%%"}}, 400, "invalid_base64"),
    ({"url": "/v1/caption", "json": {"image": "", "model": "coca"}}, 400, "not_an_image"),
    ({"url": "/v1/caption", "json": {"images": []}}, 400, "empty_input"),
    ({"url": "/v1/caption", "json": {}}, 400, "invalid_request"),
    ({"url": "/v1/embeddings", "content": b"[", "headers": JSON}, 400, "invalid_json"),
    ({"url": "/v1/embeddings", "content": b"[" * 50_000, "headers": JSON}, 400, "invalid_request"),
    ({"url": "/v1/embeddings", "content": b'{"input": "\\ud800"}', "headers": JSON}, 400, "invalid_text"),
    ({"url": "/v1/embeddings", "content": b'{"input": "a", "\\ud800": 1}', "headers": JSON}, 400, "invalid_request"),
    (embed_body([]), 400, "empty_input"),
    (embed_body("  "), 400, "empty_text"),
    (embed_body("circle " * 40), 400, "text_too_long"),
    (embed_body(["a"] * 5), 400, "too_many_inputs"),
    (embed_body([[1, 2]]), 400, "invalid_request"),
    (embed_body("http://a/b.png"), 400, "url_not_fetched"),
    (embed_body("a", dimensions=3), 400, "unsupported_dimensions"),
    (embed_body("a", encoding_format="int8"), 400, "invalid_request"),
    (embed_body("a", modle="coca"), 400, "invalid_request"),
    (embed_body("a", model="gpt-4"), 404, "model_not_found"),
    ({"url": "/v1/caption", "files": {"image": b"x"}, "data": {"model": "gpt-4"}}, 404, "model_not_found"),
    ({"url": "/v1/elsewhere", "json": {}}, 404, "no_such_route"),
    ({"url": "/healthz", "json": {}}, 405, "method_not_allowed"),
]


@pytest.mark.parametrize(
    ("request_", "status", "code"), REFUSED, ids=[f"{i}-{code}" for i, (_, _, code) in enumerate(REFUSED)]
)
def test_wrong_requests_are_refused_with_a_cause(
    config: ServeConfig, engine: Engine, images: list[bytes], request_: dict[str, Any], status: int, code: str
) -> None:
    if request_.get("files") == {"image": "TRUNCATED"}:
        request_ = {**request_, "files": {"image": images[1][:-200]}}

    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        response = await client.post(**request_)
        error = error_of(response)
        assert (response.status_code, error["code"]) == (status, code), error
        assert error["type"] == "invalid_request_error"
        assert (await client.post("/v1/embeddings", json={"input": "a"})).status_code == 200

    run(config, engine, talk)


def test_each_bad_image_is_named(config: ServeConfig, engine: Engine, images: list[bytes], to_data_uri: Any) -> None:
    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        sent = [to_data_uri(data) for data in (images[0], b"no", images[1], b"neither")]
        error = error_of(await client.post("/v1/caption", json={"images": sent}))
        assert error["param"] == "images[1]"
        assert "images[1]: " in error["message"]
        assert "images[3]: " in error["message"]

    run(config, engine, talk)


def test_too_many_pixels_are_refused_from_the_header(config: ServeConfig, engine: Engine, checkpoint: str) -> None:
    bomb = b"\x89PNG\r\n\x1a\n" + b"\0\0\0\rIHDR" + (40_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0" + b"\0\0\0\0"

    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        error = error_of(await client.post("/v1/caption", files={"image": bomb}))
        assert error["code"] == "too_many_pixels"
        assert "40000 x 40000" in error["message"]

    run(config, engine, talk)


def test_a_body_without_length_is_cut_at_the_limit(config: ServeConfig, engine: Engine) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 10_000_000:
            sent += 10_000
            yield bytes(10_000)

    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        response = await client.post("/v1/caption", content=endless(), headers=JSON)
        assert (response.status_code, error_of(response)["code"]) == (413, "body_too_large")
        assert sent == 70_000

    run(config, engine, talk)


def test_overload_is_429_with_retry_after_and_passes(config: ServeConfig, engine: Engine) -> None:
    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        model.gate.clear()
        waiting = asyncio.create_task(client.post("/v1/embeddings", json={"input": ["a"] * 4}))
        await asyncio.sleep(0.05)
        refused = await client.post("/v1/embeddings", json={"input": ["a"] * 3})
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert error_of(refused)["type"] == "overloaded_error"
        model.gate.set()
        assert (await waiting).status_code == 200
        assert (await client.post("/v1/embeddings", json={"input": ["a"] * 3})).status_code == 200

    run(config, engine, talk)


def test_a_late_answer_is_504_and_frees_its_place(config: ServeConfig, engine: Engine) -> None:
    config = config.model_copy(update={"request_timeout_s": 0.05})

    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        model.gate.clear()
        for _ in range(3):
            late = await client.post("/v1/embeddings", json={"input": ["a"] * 4})
            assert (late.status_code, error_of(late)["code"]) == (504, "timeout")

    run(config, engine, talk)


def test_failures_of_ours_tell_nothing_of_our_insides(config: ServeConfig, engine: Engine) -> None:
    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        model.failure = ValueError("secret path")
        response = await client.post("/v1/embeddings", json={"input": "a"})
        assert response.status_code == 500
        assert "secret" not in response.text
        model.failure = unavailable("no replica answers")
        response = await client.post("/v1/embeddings", json={"input": "a"})
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")

    run(config, engine, talk)


def test_health_follows_the_model_at_a_bounded_rate(config: ServeConfig, engine: Engine) -> None:
    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        answers = await asyncio.gather(*(client.get("/healthz") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {200}
        assert model.checks == 1
        assert answers[0].json() == {"status": "ok", "model": "coca", "version": engine.info.version}
        await asyncio.sleep(0.25)
        model.gate.clear()  # the model hangs
        assert (await client.get("/healthz")).status_code == 503
        await asyncio.sleep(0.25)
        model.gate.set()
        model.failure = ApiError(503, "model_unavailable", "no replica")
        assert (await client.get("/healthz")).status_code == 503
        await asyncio.sleep(0.25)
        model.failure = None
        assert (await client.get("/healthz")).status_code == 200

    run(config, engine, talk)


def test_openapi_describes_bodies_and_errors(config: ServeConfig, engine: Engine) -> None:
    async def talk(client: httpx.AsyncClient, model: EngineClient) -> None:
        schema = (await client.get("/openapi.json")).json()
        caption = schema["paths"]["/v1/caption"]["post"]
        assert set(caption["requestBody"]["content"]) == {"multipart/form-data", "application/json"}
        for operation in (caption, schema["paths"]["/v1/embeddings"]["post"]):
            assert {"200", "400", "404", "413", "429", "503", "504"} <= set(operation["responses"])
            assert "422" not in operation["responses"]
        assert "ErrorBody" in schema["components"]["schemas"]
        assert (await client.get("/docs")).status_code == 200
        assert (await client.get("/v1/models")).json()["data"][0]["embedding_dim"] == engine.info.embedding_dim

    run(config, engine, talk)
