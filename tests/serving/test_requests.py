"""serving/requests.py: what a request may say, and how a refusal is told."""

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.api_errors import ApiError
from serving.requests import (
    EmbeddingsRequest,
    RequestLimits,
    caption_inputs_of_json,
    decode_image,
    embedding_inputs,
    embeddings_response,
)
from serving.results import Embedding

LIMITS = RequestLimits(max_inputs=3, max_image_bytes=1000)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


@given(st.binary(min_size=1, max_size=900))
def test_base64_and_data_uris_give_the_bytes_back(data: bytes) -> None:
    encoded = base64_of(data)
    for text in (
        encoded,
        f"data:image/png;base64,{encoded}",
        f"DATA:image/jpeg;charset=x;BASE64,{encoded}",
        f"{encoded}\n",
    ):
        assert decode_image(text, "image", LIMITS) == data


@pytest.mark.parametrize(
    ("text", "status", "code"),
    [
        ("http://example.com/cat.png", 400, "url_not_fetched"),
        ("HTTPS://example.com/cat.png", 400, "url_not_fetched"),
        ("file:///etc/passwd", 400, "url_not_fetched"),
        ("data:image/png,rawbytes", 400, "invalid_data_uri"),
        ("data:text/html;base64,aGk=", 400, "invalid_data_uri"),
        ("data:image/png;base64", 400, "invalid_data_uri"),
        ("data:image/png;base64,@@@@", 400, "invalid_base64"),
        ("not base64 at all!", 400, "invalid_base64"),
        ("YWJ", 400, "invalid_base64"),
        ("bild: ä", 400, "invalid_base64"),
        (base64_of(bytes(1001)), 413, "image_too_large"),
        ("A" * 1_000_000, 413, "image_too_large"),
    ],
)
def test_image_texts_refused(text: str, status: int, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        decode_image(text, "images[2]", LIMITS)
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, "images[2]")


def test_embedding_inputs_keep_their_order_and_kind() -> None:
    image = f"data:image/png;base64,{base64_of(b'picture')}"
    request = EmbeddingsRequest.model_validate({"input": ["a text", image, {"text": "http://a/b"}], "model": "m"})
    inputs = embedding_inputs(request, LIMITS)
    assert inputs.items == ["a text", b"picture", "http://a/b"]
    assert inputs.names == ["input[0]", "input[1]", "input[2]"]
    assert inputs.model == "m"
    single = embedding_inputs(EmbeddingsRequest.model_validate({"input": {"image": base64_of(b"x")}}), LIMITS)
    assert (single.items, single.names) == ([b"x"], ["input"])


@pytest.mark.parametrize("text", ["look at http://a/b", "a://b c", "ratio 3://", "data: a poem"])
def test_texts_that_only_mention_a_url_are_texts(text: str) -> None:
    assert embedding_inputs(EmbeddingsRequest.model_validate({"input": text}), LIMITS).items == [text]


@pytest.mark.parametrize(
    ("value", "code"),
    [
        ([], "empty_input"),
        (["a"] * 4, "too_many_inputs"),
        ("https://a/b.png", "url_not_fetched"),
        ({"text": "\ud800"}, "invalid_text"),
    ],
)
def test_embedding_inputs_refused(value: Any, code: str) -> None:
    with pytest.raises(ApiError) as caught:
        embedding_inputs(EmbeddingsRequest.model_validate({"input": value}), LIMITS)
    assert (caught.value.status, caught.value.code) == (400, code)


@pytest.mark.parametrize("value", [[1, 2, 3], [[1, 2]], 5, None, {"video": "x"}, ["a", {"text": 1}]])
def test_inputs_of_another_shape_are_told_in_one_line(value: Any) -> None:
    with pytest.raises(ValidationError) as caught:
        EmbeddingsRequest.model_validate({"input": value})
    (problem,) = caught.value.errors()
    assert "never token ids" in problem["msg"]


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        (b"{", "invalid_json", "not JSON"),
        (b"[" * 5000, "invalid_json", "not JSON"),
        (b"[]", "invalid_request", "object"),
        (b"{}", "invalid_request", "give either"),
        (b'{"image": "aa==", "images": ["aa=="]}', "invalid_request", "give either"),
        (b'{"image": 5}', "invalid_request", "image"),
        (b'{"imag": "aa=="}', "invalid_request", "imag"),
        (b'{"images": []}', "empty_input", "empty"),
    ],
)
def test_caption_bodies_refused(body: bytes, code: str, told: str) -> None:
    with pytest.raises(ApiError) as caught:
        caption_inputs_of_json(body, LIMITS)
    assert caught.value.code == code
    assert told in caught.value.message


def test_a_refusal_never_repeats_the_payload() -> None:
    secret = "S3CR3T" * 30
    with pytest.raises(ApiError) as caught:
        caption_inputs_of_json(f'{{"images": {{"a": "{secret}"}}}}'.encode(), LIMITS)
    assert "S3CR3T" not in caught.value.message


def test_base64_vectors_are_little_endian_float32() -> None:
    vector = np.array([0.6, -0.8], dtype=np.float32)
    response = embeddings_response([Embedding(vector, 5, 1)], "coca", "base64")
    encoded = response.data[0].embedding
    assert isinstance(encoded, str)
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(encoded), "<f4"), vector)
    assert response.usage.total_tokens == 5
