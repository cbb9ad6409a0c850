"""Checkpoints that are damaged, killed in the making, or kept on an S3 that fails: the one before is gone on from."""

import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from coca import restore as restore_module
from coca.checkpoint import checkpoint_path, list_checkpoints
from coca.checkpoint_saver import CheckpointSaver
from coca.errors import RunFailed
from coca.restore import restore
from coca.run_folder import RunFolder
from coca.storage import Store
from tests.coca.checkpoint_samples import empty_tensors, equals_step, plain_at, save_steps, state_at
from tests.coca.rank_processes import run_phases
from tests.pipelines.faulty_s3 import Faults, faulty_s3

FAULTS = 300
OLD, NEW = checkpoint_path(3), checkpoint_path(6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 3 and 6, the state of each in several files."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("coca.sharded_state.FILE_BYTES", 200)
        save_steps(RunFolder(folder), 3, 6)
    return folder


def flip_bit(rng: random.Random, new: Path, old: Path, name: str) -> str:
    data = bytearray((new / name).read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    (new / name).write_bytes(data)
    return f"bit {bit} of {name}"


def truncate(rng: random.Random, new: Path, old: Path, name: str) -> str:
    data = (new / name).read_bytes()
    length = rng.randrange(len(data))
    (new / name).write_bytes(data[:length])
    return f"{name} cut at {length}"


def empty(rng: random.Random, new: Path, old: Path, name: str) -> str:
    (new / name).write_bytes(b"")
    return f"{name} empty"


def remove(rng: random.Random, new: Path, old: Path, name: str) -> str:
    (new / name).unlink()
    return f"{name} missing"


def lengthen(rng: random.Random, new: Path, old: Path, name: str) -> str:
    (new / name).write_bytes((new / name).read_bytes() + rng.randbytes(rng.randrange(1, 100)))
    return f"{name} longer"


def swap(rng: random.Random, new: Path, old: Path, name: str) -> str:
    data = (new / name).read_bytes()
    others = [other for other in files_of(new) if (new / other).read_bytes() != data]
    other = rng.choice(others)
    (new / name).write_bytes((new / other).read_bytes())
    (new / other).write_bytes(data)
    return f"{name} and {other} swapped"


def mix_steps(rng: random.Random, new: Path, old: Path, name: str) -> str:
    """Some files of another step; also its manifest, with some of them lacking."""
    differing = [each for each in files_of(new) if (new / each).read_bytes() != (old / each).read_bytes()]
    copied = rng.sample(differing, rng.randrange(1, len(differing)))
    for each in copied:
        shutil.copy(old / each, new / each)
    return f"{copied} of another step"


def damage_manifest(rng: random.Random, new: Path, old: Path, name: str) -> str:
    return rng.choice([flip_bit, truncate, empty, remove, lengthen])(rng, new, old, "manifest.json")


KINDS: list[Callable[[random.Random, Path, Path, str], str]]
KINDS = [flip_bit, flip_bit, flip_bit, truncate, empty, remove, lengthen, swap, mix_steps, damage_manifest]


def files_of(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def inject(seed: int, new: Path, old: Path) -> str:
    """Do one fault, which follows from the seed, to a checkpoint; says what was done."""
    rng = random.Random(seed)
    return KINDS[seed % len(KINDS)](rng, new, old, rng.choice(files_of(new)))


def meets_each_fault(whole: Path, folder: Path, seeds: range, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded_from: list[str] = []
    load = restore_module.load_state
    monkeypatch.setattr(
        restore_module, "load_state", lambda *each: (loaded_from.append(Path(each[0].uri).name), load(*each))[1]
    )
    shutil.copytree(whole, folder)
    for seed in seeds:
        shutil.rmtree(folder / NEW, ignore_errors=True)
        shutil.copytree(whole / NEW, folder / NEW)
        done = inject(seed, folder / NEW, folder / OLD)
        tensors = empty_tensors()
        restored = restore(RunFolder(folder), tensors)
        assert restored is not None, (seed, done)
        assert (restored.position, equals_step(tensors, 3)) == (3, True), (seed, done)
        assert len(restored.passed_over) == 1, (seed, done)
    assert set(loaded_from) == {Path(OLD).name}


def test_each_fault_is_seen_before_a_tensor_is_used(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meets_each_fault(whole, tmp_path / "run", range(FAULTS), monkeypatch)


@pytest.mark.soak
def test_many_more_faults(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meets_each_fault(whole, tmp_path / "run", range(FAULTS, 20 * FAULTS), monkeypatch)


def test_without_a_fault_the_newest_is_taken(whole: Path) -> None:
    """Else the tests above could not fail."""
    tensors = empty_tensors()
    restored = restore(RunFolder(whole), tensors)
    assert restored is not None
    assert (restored.position, restored.passed_over, equals_step(tensors, 6)) == (6, [], True)


def kill_in_save(folder: str) -> None:
    """Kill a save at each of its writes and removals: before, in the middle and after."""
    outcomes: dict[str, list[str]] = {}
    for moment in ("before", "middle", "after"):
        for number in range(100):
            run = RunFolder(f"{folder}/{moment}-{number}")
            save_steps(run, 3)
            child = os.fork()
            if child == 0:
                _save_until(run, number, moment)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            if os.WIFEXITED(status):
                break
            assert os.WTERMSIG(status) == signal.SIGKILL
            tensors = empty_tensors()
            restored = restore(run, tensors)
            assert restored is not None
            assert equals_step(tensors, restored.position)
            assert not list(run.path.rglob("*.tmp"))
            assert run.store.list("checkpoints") == [
                Path(checkpoint_path(step)).name for step in list_checkpoints(run.store)
            ]
            outcomes.setdefault(moment, []).append("new" if restored.position == 6 else "old")
    print(json.dumps(outcomes), file=sys.stderr)


def _save_until(run: RunFolder, number: int, moment: str) -> None:
    done = 0
    write, delete = Store.write, Store.delete

    def kill_at(wanted: str) -> None:
        if done == number and moment == wanted:
            os.kill(os.getpid(), signal.SIGKILL)

    def killing_write(self: Store, path: str, data: bytes) -> None:
        nonlocal done
        kill_at("before")
        if done == number and moment == "middle":
            target = Path(self.path(path))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(f".{target.name}.{'0' * 32}.tmp").write_bytes(data[: len(data) // 2])
        kill_at("middle")
        write(self, path, data)
        kill_at("after")
        done += 1

    def killing_delete(self: Store, path: str) -> None:
        nonlocal done
        kill_at("before")
        if done == number and moment == "middle" and self.is_folder(path):
            delete(self, f"{path}/{self.list(path)[0]}")
        kill_at("middle")
        delete(self, path)
        kill_at("after")
        done += 1

    Store.write, Store.delete = killing_write, killing_delete  # type: ignore[method-assign]
    with CheckpointSaver(run, keep=1) as saver:
        saver.save(state_at(6), plain_at(6))


def test_a_kill_at_any_moment_of_a_save(tmp_path: Path) -> None:
    """The folder is emptied, six files and the manifest written, then the old checkpoint goes."""
    said = run_phases(__name__, [("kill_in_save", 0)], str(tmp_path))
    outcomes = json.loads(said.strip().splitlines()[-1])
    assert outcomes == {
        "before": ["old"] * 8 + ["new"] * 2,
        "middle": ["old"] * 8 + ["new"] * 2,
        "after": ["old"] * 7 + ["new"] * 3,
    }


def test_s3_that_fails_now_and_then(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    comes_through(s3, s3_server, Faults(0.04, 0.0, 0.04, 0.04, 0.04, slow_s=0.02), 1, monkeypatch)


@pytest.mark.soak
def test_s3_that_fails_all_the_time(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coca.sharded_state.FILE_BYTES", 200)
    comes_through(s3, s3_server, Faults(0.06, 0.06, 0.06, 0.06, 0.06, slow_s=0.02), 3, monkeypatch)


def comes_through(uri: str, server: str, faults: Faults, saves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each save and restore, whether S3 answers 503, late, cut short or not at all."""
    with faulty_s3(server, seed=3, faults=faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        run, tensors = RunFolder(uri), empty_tensors()
        with CheckpointSaver(run, keep=2) as saver:
            for step in range(1, saves + 1):
                run.append_metrics({"step": step})
                saver.save(state_at(step), plain_at(step))
        restored = restore(RunFolder(uri), tensors)
        assert restored is not None
        assert (restored.position, restored.passed_over, equals_step(tensors, saves)) == (saves, [], True)
        assert [row["step"] for row in RunFolder(uri).read_metrics()] == list(range(1, saves + 1))
        assert proxy.counts().total() > proxy.counts()[""], proxy.counts()


def test_s3_that_is_away_is_no_damage(s3: str, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole checkpoints that cannot be read now are neither passed over nor removed."""
    save_steps(RunFolder(s3), 1, 2)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with faulty_s3(s3_server, seed=3, faults=Faults(slow_down=1.0, in_a_row=10**6)) as proxy:
        proxy.set(Faults(slow_down=1.0, in_a_row=10**6), only=r"\.distcp")
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        with pytest.raises(RunFailed, match="does not answer as it should"):
            restore(RunFolder(s3), empty_tensors())
        saver = CheckpointSaver(RunFolder(s3), keep=2)
        saver.save(state_at(3), plain_at(3))
        with pytest.raises(
            RunFailed, match=r"does not answer as it should: .*; run the same command again once it does"
        ):
            saver.close()
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    assert list_checkpoints(RunFolder(s3).store) == [1, 2]
