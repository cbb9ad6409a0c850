"""Rows of metrics that outlive kills, on disk and on S3, and checkpoints that come and go."""

import json
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coca.errors import BadInput, RunFailed
from coca.run_folder import RunFolder
from coca.storage import Store
from tests.s3_uploads import begin_upload, begun_uploads


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run" if request.param == "disk" else request.getfixturevalue("s3"))


def rows(*steps: int) -> list[dict[str, int]]:
    return [{"step": step} for step in steps]


def fill(run: RunFolder, *steps: int) -> None:
    run.start("a: 1\n")
    for row in rows(*steps):
        run.append_metrics(row)
    run.flush()


def test_a_new_folder(run: RunFolder) -> None:
    assert (run.exists, run.latest_step(), run.read_metrics(), run.last_metrics()) == (False, None, [], None)
    run.forget_metrics_after(3)
    run.start("a: 1\n")
    assert (run.exists, run.read_metrics(), run.last_metrics()) == (True, [], None)
    assert pickle.loads(pickle.dumps(run)).uri == run.uri


def test_rows_come_back(run: RunFolder) -> None:
    fill(run, 1, 2, 3)
    assert run.read_metrics() == rows(1, 2, 3)
    assert run.last_metrics() == {"step": 3}


def test_rows_that_will_be_replayed_are_forgotten(run: RunFolder) -> None:
    fill(run, 1, 2, 3, 4)
    again = RunFolder(run.uri)
    again.forget_metrics_after(2)
    assert again.read_metrics() == rows(1, 2)
    again.append_metrics({"step": 3})
    again.flush()
    assert again.read_metrics() == rows(1, 2, 3)


def test_rows_are_added_to_those_that_are_there(run: RunFolder) -> None:
    fill(run, 1, 2)
    fill(RunFolder(run.uri), 3)
    assert run.read_metrics() == rows(1, 2, 3)


def test_a_line_that_was_cut_short_is_passed_over(run: RunFolder) -> None:
    run.store.write("metrics.jsonl", b'{"step": 1}\n{"step": 2}\n{"ste')
    assert run.read_metrics() == rows(1, 2)
    assert run.last_metrics() == {"step": 2}
    run.forget_metrics_after(2)
    assert run.store.read("metrics.jsonl") == b'{"step": 1}\n{"step": 2}\n'


def test_the_last_row_of_a_long_file(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coca.run_folder._TAIL_BYTES", 40)
    fill(run, *range(100))
    assert run.last_metrics() == {"step": 99}
    run.append_metrics({"step": 100, "text": "x" * 100})
    run.flush()
    assert run.last_metrics() == {"step": 100, "text": "x" * 100}


def test_asking_for_the_last_row_reads_no_more_than_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    run.store.write("metrics.jsonl", b'{"step": 1}\n' * 10**6)
    monkeypatch.setattr(Store, "read", lambda self, path: pytest.fail("the whole file was read"))
    started = time.perf_counter()
    assert run.last_metrics() == {"step": 1}
    assert time.perf_counter() - started < 0.5


def test_a_kill_loses_no_row_on_disk(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from coca.run_folder import RunFolder; run = RunFolder(sys.argv[1])\n"
        "for step in range(500): run.append_metrics({'step': step, 'text': 'x' * 20_000})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in RunFolder(tmp_path).read_metrics()] == list(range(500))


def test_s3_is_written_at_most_every_ten_seconds(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first row at once, beside the caller; then nothing until it is time, or until flush."""
    run, write, written = RunFolder(s3), Store.write, []
    monkeypatch.setattr(
        Store, "write", lambda self, *arguments: (written.append(arguments), write(self, *arguments))[1]
    )
    for step in range(200):
        run.append_metrics({"step": step})
        time.sleep(0.001)
    assert len(written) == 1
    run.flush()
    run.flush()
    assert len(written) == 2
    assert len(run.read_metrics()) == 200
    monkeypatch.setattr("coca.run_folder._S3_WRITE_EVERY_S", 0.0)
    run.append_metrics({"step": 200})
    for _ in range(100):
        if len(written) == 3:
            break
        time.sleep(0.1)
    assert len(written) == 3


def test_s3_that_takes_no_rows_is_said(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Store, path: str, data: bytes) -> None:
        raise RunFailed("does not answer")

    run = RunFolder(s3)
    monkeypatch.setattr(Store, "write", fail)
    run.append_metrics({"step": 1})
    for _ in range(100):
        if run._failure is not None:
            break
        time.sleep(0.1)
    with pytest.raises(RunFailed, match="does not answer"):
        run.append_metrics({"step": 2})
    with pytest.raises(RunFailed, match="does not answer"):
        run.flush()
    monkeypatch.undo()


def test_checkpoints_that_were_never_finished_are_swept(run: RunFolder) -> None:
    for name in ("step_000000002/manifest.json", "step_000000002/x", "step_000000004/x", "mine/x", "step_best/x"):
        run.store.write(f"checkpoints/{name}", b"{}")
    assert run.latest_step() == 2
    assert run.sweep() == ["step_000000004"]
    assert run.store.list("checkpoints") == ["mine", "step_000000002", "step_best"]
    run.remove_checkpoint(2)
    assert run.store.list("checkpoints") == ["mine", "step_best"]


def test_half_written_files_are_swept_beside_checkpoints_only(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.store.write("checkpoints/step_000000002/manifest.json", b"{}")
    half = tmp_path / "checkpoints/step_000000002" / f".model.safetensors.{'a' * 32}.tmp"
    others = tmp_path / f".config.yaml.{'a' * 32}.tmp"
    half.write_bytes(b"x")
    others.write_bytes(b"x")
    run.sweep()
    assert (half.exists(), others.exists()) == (False, True)


def test_at_the_end_of_a_run_on_s3_what_others_write_goes_on(s3: str) -> None:
    run = RunFolder(f"{s3}/runs")
    for path in ("checkpoints/step_000000002/model.safetensors", "another/checkpoints/step_000000004/state"):
        begin_upload(run.store, path)
    run.sweep_files()
    assert begun_uploads(run.store) == ["another/checkpoints/step_000000004/state"]


def test_at_the_end_of_a_run_on_disk_no_half_written_file_is_left(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.store.write("checkpoints/step_000000002/manifest.json", b"{}")
    for folder in ("checkpoints/step_000000002", "."):
        (tmp_path / folder / f".a.{'a' * 32}.tmp").write_bytes(b"x")
    run.sweep_files()
    assert list(tmp_path.rglob(".*.tmp")) == []


def test_a_manifest_goes_before_its_files(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[str] = []
    monkeypatch.setattr(Store, "delete", lambda self, path: deleted.append(path))
    run.remove_checkpoint(2)
    assert deleted == ["checkpoints/step_000000002/manifest.json", "checkpoints/step_000000002"]


def test_a_file_in_its_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match=r"--out .*file is a file"):
        RunFolder(tmp_path / "file")


def test_rows_are_plain_json_lines(run: RunFolder) -> None:
    fill(run, 1)
    run.append_metrics({"step": 2, "text": "grün\n"})
    run.flush()
    data = run.store.read("metrics.jsonl")
    assert [json.loads(line) for line in data.decode().splitlines()] == [{"step": 1}, {"step": 2, "text": "grün\n"}]
    assert data.endswith(b"\n")
