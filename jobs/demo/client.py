"""A small client of the service: what the demo asks it, over real HTTP."""

import base64
import json
import math
import time
import urllib.error
import urllib.request
from typing import Any

from jobs.demo.pictures import data_uri

# Straight to loopback, whatever proxy the environment names.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask_service(url: str, pictures: list[tuple[bytes, list[str]]]) -> dict[str, Any]:
    """Captions of ``pictures`` (encoded bytes, accepted captions), embeddings of the first and its caption.

    Returns:
        ``captions``: ``expected`` (the plainest), ``caption``, ``exact``, ``latency_ms``; ``embedding_dim``;
        ``similarity`` of the first picture to its own caption and to the others' (mean); ``bad_image_status``.
    """
    captions = [_caption(url, image, accepted) for image, accepted in pictures]
    texts = [accepted[0] for _, accepted in pictures]
    inputs = [*texts, data_uri(pictures[0][0])]
    answer = _post(f"{url}/v1/embeddings", {"input": inputs})
    *text_vectors, image_vector = [item["embedding"] for item in answer["data"]]
    own, *others = [_dot(image_vector, vector) for vector in text_vectors]
    return {
        "captions": captions,
        "embedding_dim": len(image_vector),
        "similarity": {"own_caption": own, "other_captions": sum(others) / len(others) if others else None},
        "bad_image_status": _status_of_a_bad_image(url),
    }


def _caption(url: str, image: bytes, accepted: list[str]) -> dict[str, Any]:
    started = time.perf_counter()
    answer = _post(f"{url}/v1/caption", {"image": data_uri(image)})
    latency_ms = (time.perf_counter() - started) * 1000
    caption = answer["data"][0]["caption"]
    return {
        "expected": accepted[0],
        "caption": caption,
        "exact": caption in accepted,
        "latency_ms": round(latency_ms, 1),
    }


def _status_of_a_bad_image(url: str) -> int:
    """The service must refuse what is no image, with a cause, and stay up: /healthz is asked afterwards."""
    try:
        _post(f"{url}/v1/caption", {"image": base64.b64encode(b"<html>not a picture").decode()})
        status = 200
    except urllib.error.HTTPError as error:
        status = error.code
        error.close()
    with _OPENER.open(f"{url}/healthz", timeout=60) as answer:
        answer.read()
    return status


def _post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # noqa: S310 - our own service
    with _OPENER.open(request, timeout=60) as answer:
        return json.load(answer)


def _dot(first: list[float], second: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(first, second, strict=True))
