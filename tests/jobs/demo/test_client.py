"""The demo's client, against a small server that answers in the service's shapes."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from jobs.demo.client import ask_service
from jobs.demo.pictures import data_uri

PNG = b"\x89PNG one"
VECTORS = {"a red star": [0.6, 0.8], "a blue ring": [-0.8, 0.6], data_uri(PNG): [0.0, 1.0]}


class Service(BaseHTTPRequestHandler):
    """Captions by the picture's bytes, vectors by the input."""

    def do_GET(self):
        self._answer(200, {"status": "ok"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/embeddings":
            data = [{"index": i, "embedding": VECTORS[item]} for i, item in enumerate(body["input"])]
            return self._answer(200, {"data": data})
        image = base64.b64decode(body["image"].rpartition(",")[2])
        if image.startswith(b"<html>"):
            return self._answer(400, {"error": {"message": "no image"}})
        return self._answer(200, {"data": [{"index": 0, "caption": "a red star"}]})

    def _answer(self, status, value):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *values):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_captions_are_judged_and_embeddings_compared(url, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # must not be asked about loopback
    result = ask_service(url, [(PNG, ["a red star", "the red star"]), (b"RIFF", ["a blue ring"])])
    first, second = result["captions"]
    assert (first["expected"], first["caption"], first["exact"]) == ("a red star", "a red star", True)
    assert (second["expected"], second["exact"]) == ("a blue ring", False)
    assert first["latency_ms"] > 0
    assert result["embedding_dim"] == 2
    assert result["similarity"] == {"own_caption": pytest.approx(0.8), "other_captions": pytest.approx(0.6)}
    assert result["bad_image_status"] == 400
