"""jobs/commands/serve.py: from the first line to a clean stop, and wrong use."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from jobs.cli import cli
from jobs.cluster import ClusterInfo


def test_serves_until_sigterm_and_exits_0(ray_cluster: ClusterInfo, checkpoint: str, images: list[bytes]) -> None:
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster.address}
    arguments = ["serve", "--checkpoint", checkpoint, "--port", "0", "--set", "cpus_per_replica=0.5", "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "jobs.cli", *arguments], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            announced = re.search(r"on (http://\S+)", process.stdout.readline())
            assert announced is not None
            answer = httpx.post(f"{announced[1]}/v1/caption", files={"image": images[0]}, timeout=30)
            assert answer.status_code == 200
            process.send_signal(signal.SIGTERM)
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert json.loads(rest.splitlines()[-1])["url"] == announced[1]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{announced[1]}/healthz")


def exit_code(*arguments: str) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", *arguments])
    return caught.value.code


def test_a_taken_port_exits_2_in_one_line(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert exit_code("--checkpoint", checkpoint, "--port", str(port)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: port {port} on 127.0.0.1 is taken. ")


def test_a_damaged_checkpoint_exits_2_in_one_line(
    checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in Path(checkpoint).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    assert exit_code("--checkpoint", str(tmp_path), "--port", "0") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.safetensors does not match its SHA-256" in line


def test_an_unknown_setting_exits_2_with_the_nearest(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--checkpoint", checkpoint, "--set", "max_batch=4") == 2
    assert "Did you mean 'max_batch_size'" in capsys.readouterr().err
