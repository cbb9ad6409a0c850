"""Saving beside the training: what is kept, in which order it is written, and who hears of a failure."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from coca.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from coca.checkpoint_saver import CheckpointSaver
from coca.errors import RunFailed
from coca.manifest import find_damage, read_manifest
from coca.restore import restore
from coca.run_folder import RunFolder
from coca.storage import Store
from tests.coca.checkpoint_samples import (
    empty_tensors,
    equals_step,
    plain_at,
    save_steps,
    state_at,
    tensors_at,
)
from tests.coca.rank_processes import run_phases


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths in the order in which they are written."""
    paths: list[str] = []
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda self, path, data: (paths.append(path), write(self, path, data))[1])
    return paths


def fail_writes(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> None:
    write = Store.write

    def failing(self: Store, path: str, data: bytes) -> None:
        if path.endswith(name):
            raise error
        write(self, path, data)

    monkeypatch.setattr(Store, "write", failing)


def test_the_manifest_is_written_last_and_lists_all(run: RunFolder, writes: list[str]) -> None:
    save_steps(run, 5)
    folder = run.store.child(checkpoint_path(5))
    entries, _ = read_manifest(folder)
    assert writes[-1] == f"{checkpoint_path(5)}/manifest.json"
    assert {f"{checkpoint_path(5)}/{name}" for name in entries} == set(writes[:-1])
    assert [find_damage(folder, name, entry) for name, entry in entries.items()] == [None] * 6


def test_the_plain_part_loads_without_the_rest(run: RunFolder) -> None:
    save_steps(run, 5)
    run.store.delete(f"{checkpoint_path(5)}/state")
    loaded = load_checkpoint(run.uri)
    assert (loaded.step, loaded.provenance) == (5, {"dataset": "here"})
    assert all(torch.equal(loaded.model.state_dict()[name], value) for name, value in plain_at(5).weights.items())


def test_training_goes_on_while_a_save_is_written(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes after save() is not in the checkpoint; close() waits."""
    go_on, write = threading.Event(), Store.write
    monkeypatch.setattr(Store, "write", lambda self, *arguments: (go_on.wait(30), write(self, *arguments))[1])
    tensors = tensors_at(5)
    saver = CheckpointSaver(run, keep=2)
    saver.save(state_at(5, tensors), plain_at(5))
    for tensor in tensors.values():
        tensor.zero_()
    assert list_checkpoints(run.store) == []
    go_on.set()
    saver.close()
    loaded = empty_tensors()
    assert restore(run, loaded) is not None
    assert equals_step(loaded, 5)


def test_a_save_waits_for_the_one_before_and_says_how_long(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    write = Store.write
    monkeypatch.setattr(Store, "write", lambda self, *arguments: (time.sleep(0.05), write(self, *arguments))[1])
    with CheckpointSaver(run, keep=2) as saver:
        first = saver.save(state_at(1), plain_at(1))
        second = saver.save(state_at(2), plain_at(2))
    assert second > 0.05 * 5
    assert first < second
    assert list_checkpoints(run.store) == [1, 2]


def test_the_newest_are_kept_and_what_is_not_ours(run: RunFolder) -> None:
    run.store.write("checkpoints/best/x", b"")
    run.store.write("checkpoints/step_000000001/model.safetensors", b"")  # a save that was killed
    save_steps(run, 2, 4, 6, keep=2)
    assert run.store.list("checkpoints") == ["best", "step_000000004", "step_000000006"]


def test_old_ones_go_only_once_the_new_manifest_is_there(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(run, 2, keep=1)
    fail_writes(monkeypatch, "manifest.json", OSError("away"))
    with pytest.raises(RunFailed, match="away"):
        save_steps(run, 4, keep=1)
    assert run.store.list("checkpoints") == ["step_000000002"]


@pytest.mark.parametrize(
    ("measure", "scores", "kept"),
    [
        ("loss", [3.0, 1.0, 2.0, 4.0, 5.0], [2, 5]),
        ("captioning_loss", [3.0, 1.0, 1.0, 4.0, 5.0], [3, 5]),
        ("image_to_text_recall_at_1", [0.1, 0.9, 0.2, 0.3, 0.4], [2, 5]),
        ("loss", [float("nan"), None, float("inf"), 2.0, float("-inf")], [4, 5]),
        (None, [3.0, 1.0, 2.0, 4.0, 5.0], [5]),
    ],
)
def test_the_best_is_kept_too(run: RunFolder, measure: str | None, scores: list[float | None], kept: list[int]) -> None:
    for step, score in enumerate(scores, start=1):  # each in a run that was started again
        with CheckpointSaver(run, keep=1, keep_best=measure) as saver:
            saver.save(state_at(step), plain_at(step), score=score)
    assert list_checkpoints(run.store) == kept


def test_scores_of_another_measure_do_not_count(run: RunFolder) -> None:
    for step, measure, score in ((1, "loss", 0.1), (2, "recall", 0.2), (3, "recall", 0.3), (4, "recall", 0.25)):
        with CheckpointSaver(run, keep=1, keep_best=measure) as saver:
            saver.save(state_at(step), plain_at(step), score=score)
    assert list_checkpoints(run.store) == [3, 4]


def test_a_damaged_one_that_the_run_went_back_behind_is_replaced(run: RunFolder) -> None:
    save_steps(run, 2, 4, 6)
    run.store.write(f"{checkpoint_path(6)}/resume.json", b"{}")
    save_steps(run, 5, keep=2)
    assert list_checkpoints(run.store) == [4, 5]
    run.store.write(f"{checkpoint_path(6)}/manifest.json", b"{}")
    run.store.write(f"{checkpoint_path(6)}/state/other", b"")
    save_steps(run, 6, keep=2)
    assert run.store.list(f"{checkpoint_path(6)}/state") == [".metadata", "__0_0.distcp"]


def test_rows_of_metrics_are_safe_before_the_manifest(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    there: list[bool] = []
    flush = RunFolder.flush
    monkeypatch.setattr(
        RunFolder, "flush", lambda self: (there.extend([bool(list_checkpoints(self.store))]), flush(self))
    )
    save_steps(run, 1)
    assert there == [False]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), r"no space is left in .*run for the checkpoint of step 2: free some"),
        (RunFailed("s3://x does not answer as it should: 503"), r"s3://x does not answer"),
        (
            OSError(5, "Input/output error"),
            r"step 2 could not be written to .*: OSError: .*Input/output error; once it",
        ),
        (ValueError("odd"), r"step 2 could not be written .* ValueError: odd"),
    ],
)
@pytest.mark.parametrize("name", [".distcp", "model.safetensors"])
def test_a_save_that_fails_says_what_to_do(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str, name: str
) -> None:
    save_steps(run, 1)
    fail_writes(monkeypatch, name, error)
    saver = CheckpointSaver(run, keep=2)
    saver.save(state_at(2), plain_at(2))
    with pytest.raises(RunFailed, match=message):
        saver.save(state_at(3), plain_at(3))
    saver.check()  # it was said
    saver.close()
    assert run.store.list("checkpoints") == ["step_000000001"]


def test_what_ended_the_training_is_what_is_heard_of(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_writes(monkeypatch, ".metadata", OSError("away"))
    with pytest.raises(ZeroDivisionError), CheckpointSaver(run, keep=2) as saver:
        saver.save(state_at(1), plain_at(1))
        raise ZeroDivisionError


def save_on_ranks(folder: str) -> None:
    """Two saves, the second of which fails on one rank only: all hear of it, and the first stays."""
    saver = CheckpointSaver(RunFolder(folder), keep=1)
    saver.save(state_at(1), plain_at(1))
    saver.wait()
    saver.check()
    if saver._side.rank == 2:
        saver._run.store.write = _full  # type: ignore[method-assign]
    saver.save(state_at(2), plain_at(2))
    saver.wait()
    with pytest.raises(RunFailed, match="no space is left"):
        saver.check()
    saver.close()


def _full(path: str, data: bytes) -> Any:
    raise OSError(28, "No space left on device")


def test_a_failure_on_one_rank_is_raised_on_all(tmp_path: Path) -> None:
    run_phases(__name__, [("save_on_ranks", 3)], str(tmp_path))
    assert list_checkpoints(Store(tmp_path)) == [1]
    files = json.loads((tmp_path / checkpoint_path(1) / "manifest.json").read_text())["files"]
    assert {name for name in files if name.endswith(".distcp")} == {f"state/__{rank}_0.distcp" for rank in range(3)}
