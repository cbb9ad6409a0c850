import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer
from threading import Thread

import pytest

from coca.errors import BadInput, RunFailed
from jobs import submit as submit_module
from jobs.cluster import ClusterInfo
from jobs.submit import LogLines, Target, entrypoint, submit

# --- the command and where it goes ---


def test_entrypoint_keeps_words_apart():
    words = ["train", "--data", "my data", "--set", "a=$HOME"]
    here = Target("http://127.0.0.1:8265", local=True, ends_with_us=True, gcs_address="127.0.0.1:6379")
    line = entrypoint(words, here, Path("/some where"))
    job = f"{sys.executable} -m jobs.cli -C '/some where' train --data 'my data' --set 'a=$HOME'"
    assert line == f"env RAY_ADDRESS=127.0.0.1:6379 {job}"
    there = Target("http://head:8265", local=False, ends_with_us=False)
    assert entrypoint(words[:3], there, Path("/x")) == "python -m jobs.cli train --data 'my data'"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["trian"], "unknown command 'trian'. Did you mean `coca submit -- train`"),
        (["coca"], "no command to submit"),
    ],
)
def test_unknown_commands_never_reach_a_cluster(command: list[str], message: str):
    with pytest.raises(BadInput, match=message):
        submit(command)


def test_no_wait_needs_a_cluster_that_stays():
    with pytest.raises(BadInput, match=r"--no-wait needs a cluster that outlives this command. Give --address"):
        submit(["doctor"], follow=False)


@pytest.fixture
def web_server() -> Iterator[str]:
    """Something that speaks HTTP and is not Ray."""
    with TCPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_addresses_that_are_no_dashboard(web_server: str, tmp_path: Path):
    for address, message in [
        ("head:8265", "'head:8265' is not the URL of a Ray dashboard. Write --address http://HOST:8265"),
        ("http://127.0.0.1:1", "nothing answers at http://127.0.0.1:1: .*refused"),
        (web_server, "does not answer as a Ray dashboard"),
    ]:
        with pytest.raises(BadInput, match=message):
            submit(["doctor"], address=address, working_dir=tmp_path)


class StartingCluster:
    """A Jobs API that refuses the first jobs, as Ray does while its agents start."""

    def __init__(self, refusals: int, message: str) -> None:
        self.refusals, self.message = refusals, message

    def submit_job(self, **job: object) -> str:
        self.refusals -= 1
        if self.refusals >= 0:
            raise RuntimeError(f"Request failed with status code 500: {self.message}")
        return "raysubmit_1"


def test_a_cluster_that_is_starting_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    pauses: list[float] = []
    monkeypatch.setattr(submit_module.time, "sleep", pauses.append)
    starting = StartingCluster(3, "No available agent to submit job, please try again later.")
    assert submit_module._start(starting, "x", {}, None, print) == "raysubmit_1"
    assert pauses == [0.5, 1.0, 2.0]
    with pytest.raises(RunFailed, match=r"did not take the job: .*disk full"):
        submit_module._start(StartingCluster(1, "disk full"), "x", {}, None, print)


# --- the log ---


def test_chunks_become_lines_and_a_reconnection_repeats_nothing():
    lines: list[str] = []
    log = LogLines(lines.append)
    for chunk in ["one\ntw", "o\nthree\nfo"]:
        log.feed(chunk)
    log.restart()
    for chunk in ["one\ntwo\n", "three\nfour\nfi", "ve"]:
        log.feed(chunk)
    log.close()
    assert lines == ["one", "two", "three", "four", "five"]


# --- real jobs ---


@pytest.mark.ray
def test_a_local_job_works_on_the_files_of_its_folder(ray_cluster: ClusterInfo, tmp_path: Path):
    (tmp_path / "captions.csv").write_text("caption\na red cat\n")
    lines: list[str] = []
    command = ["coca", "tokenizer", "train", "--from", "captions.csv", "--out", "tokenizer.json", "--json"]
    assert submit(command, working_dir=tmp_path, on_line=lines.append) == 0
    assert json.loads(next(line for line in lines if line.startswith("{")))["captions"] == 1
    assert (tmp_path / "tokenizer.json").is_file()


@pytest.mark.ray
def test_a_job_elsewhere_by_its_url_fails_with_its_exit_code_and_is_not_run_twice(
    ray_cluster: ClusterInfo, tmp_path: Path
):
    """A process of its own, as a user's shell; the cluster's machine is this one, which the job cannot know."""
    (tmp_path / "mine.yaml").write_text("nope: 1\n")

    def run(*flags: str, token: str = os.environ["RAY_AUTH_TOKEN"]) -> subprocess.CompletedProcess[str]:
        words = ["--address", ray_cluster.dashboard_url, "--python", sys.executable, *flags]
        command = ["--", "config", "show", "train", "--config", "mine.yaml"]
        return subprocess.run(
            [sys.executable, "-m", "jobs.cli", "submit", *words, *command],
            env=os.environ | {"RAY_AUTH_TOKEN": token, "RAY_ADDRESS": "127.0.0.1:1"},  # --address wins
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )

    refused = run("--submission-id", "twice", token="0" * 64)
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"error: the cluster at {ray_cluster.dashboard_url} refuses our token")
    submitted = run("--submission-id", "twice", "--no-wait")
    assert submitted.returncode == 0, submitted.stderr
    assert f"ray job stop --address {ray_cluster.dashboard_url} twice" in submitted.stdout
    followed = run("--submission-id", "twice", "--json")
    assert followed.returncode == 2, followed.stdout + followed.stderr
    assert "not submitted again" in followed.stdout
    assert "error: unknown config key 'nope'" in followed.stdout
    assert json.loads(followed.stdout.splitlines()[-1])["exit_code"] == 2
