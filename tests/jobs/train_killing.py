"""Killing a training run: its command in a process of its own, its workers, the moments, and what must be left."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coca.checkpoint import checkpoint_step, load_checkpoint
from coca.run_folder import RunFolder
from coca.storage import Store
from jobs.config import TrainRunConfig
from tests.process_table import processes
from tests.s3_uploads import begun_uploads

ROOT = Path(__file__).parents[2]
LOADED_MACHINE_S = 400
SAVE_TRIES = 5
FIELDS = ("step", "samples_seen", "batch_digest", "loss", "contrastive_loss", "captioning_loss", "learning_rate")
FIELDS += ("grad_norm", "temperature", "skipped_steps")


class TrainCommand:
    """``coca train`` with a config, to be run as often as it is killed."""

    def __init__(self, config: TrainRunConfig, folder: Path, **environment: str) -> None:
        self.run = RunFolder(config.out)
        config_file = folder / "config.yaml"
        config_file.write_text(config.to_yaml())
        self.arguments = [sys.executable, "-m", "jobs.cli", "train", "--config", str(config_file), "--json"]
        self.arguments += ["--data", config.data[0].uri, "--out", config.out]
        self._environment = os.environ | environment
        self._log = folder / "stderr.txt"

    def start(self) -> "subprocess.Popen[str]":
        with self._log.open("a") as log:
            return subprocess.Popen(
                self.arguments, env=self._environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=log
            )

    def finish(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        """What the command says at its end, which must be a good one."""
        stdout, _ = process.communicate(timeout=LOADED_MACHINE_S)
        assert process.returncode == (143 if '"stopped": "SIGTERM"' in stdout else 0), self.log()
        result: dict[str, Any] = json.loads(stdout.strip().splitlines()[-1])
        return result

    def log(self) -> str:
        return self._log.read_text()

    def newest_step(self) -> int:
        """The last row of metrics.jsonl, 0 where there is none."""
        row = self.run.last_metrics()
        return row["step"] if row else 0


def numbers(run: RunFolder) -> list[dict[str, Any]]:
    """The deterministic fields of each row."""
    return [{name: row[name] for name in FIELDS} for row in run.read_metrics()]


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_checkpoint(run.uri).model.state_dict()


def orphans(run: RunFolder) -> list[str]:
    """Checkpoint folders without a manifest, and files that were being written."""
    return sorted(unfinished(run)) + half_written(run.store)


def unfinished(run: RunFolder) -> set[str]:
    """Checkpoint folders that have no manifest."""
    names = {name for name in run.store.list("checkpoints") if checkpoint_step(name) is not None}
    # One that is deleted loses its manifest first.
    return {name for name in names if not is_whole(run, name)} & set(run.store.list("checkpoints"))


def is_whole(run: RunFolder, name: str) -> bool:
    return run.store.exists(f"checkpoints/{name}/manifest.json")


def half_written(store: Store) -> list[str]:
    return begun_uploads(store) if store.is_s3 else [str(path) for path in Path(store.root).rglob(".*.tmp")]


@dataclass(frozen=True)
class Workers:
    """The training workers of one Ray, by the address of its control plane: others run on the same machine."""

    address: str

    def pids(self) -> list[int]:
        there = list(processes())
        raylets = [pid for pid, _, line in there if "raylet" in line and f"--gcs-address={self.address}" in line]
        return [pid for pid, parent, line in there if parent in raylets and line.startswith("ray::RayTrainWorker")]

    def with_children(self) -> set[int]:
        """The workers, and what they have started."""
        there, found = list(processes()), set(self.pids())
        for _ in range(3):  # children, theirs, and theirs
            found |= {pid for pid, parent, _ in there if parent in found}
        return found


def alive(pids: set[int]) -> set[int]:
    return pids & {pid for pid, _, _ in processes()}


def wait_until(moment: Callable[[], Any], process: "subprocess.Popen[str] | None" = None) -> bool:
    """Whether ``moment`` came before the process ended."""
    ends_at = time.monotonic() + LOADED_MACHINE_S
    while time.monotonic() < ends_at:
        if moment():
            return True
        if process is not None and process.poll() is not None:
            return False
        time.sleep(0.002)
    raise TimeoutError


@dataclass
class TrainChaos:
    """Kills at moments drawn by a seed, counted by what they were: ``driver``, ``worker`` (any of them), ``save`` (a
    worker, and the checkpoint that was being written has not become whole), and ``stop``, which asks the driver to end.

    What a run that ends too early for a kill leaves out is not counted."""

    command: TrainCommand
    workers: Workers
    random: random.Random
    steps: int
    kills: Counter[str] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)
    """Workers that were there before a kill, and what they had started."""

    def run(self, targets: list[str]) -> dict[str, Any]:
        """Run the command, kill each target once in turn, start it again where that was the driver; then let it end."""
        process = self.command.start()
        try:
            for number, target in enumerate(targets):
                # Later targets are killed at later steps, so that each kill meets a run that goes on.
                first, last = (round(share * 0.9 * self.steps / len(targets)) for share in (number, number + 1))
                step = self.random.randint(max(first, 1), max(last, 1))
                if wait_until(lambda step=step: self.command.newest_step() >= step, process):
                    self._kill(target, process)
                if process.poll() is not None:
                    process = self.command.start()
            return self.command.finish(process)
        finally:
            process.kill()

    def _kill(self, target: str, process: "subprocess.Popen[str]") -> None:
        if target == "save":
            return self._kill_in_save(process)
        time.sleep(self.random.uniform(0.0, 0.02))
        if target == "worker":
            return self._kill_worker(process)
        self.seen |= self.workers.with_children()
        if target == "driver":
            process.send_signal(signal.SIGKILL)
            process.communicate()
            self.kills[target] += process.returncode == -signal.SIGKILL
        else:
            process.send_signal(signal.SIGTERM)
            result = self.command.finish(process)
            self.kills[target] += result["stopped"] == "SIGTERM" and self.command.run.latest_step() == result["steps"]

    def _kill_worker(self, process: "subprocess.Popen[str]") -> None:
        killed = False
        while not killed and wait_until(self.workers.pids, process):
            self.seen |= self.workers.with_children()
            killed = self._kill_one_of(self.workers.pids())
        self.kills["worker"] += killed

    def _kill_in_save(self, process: "subprocess.Popen[str]") -> None:
        """One that came too late, when the checkpoint was whole, was one of any worker: again at the next save."""
        for _ in range(SAVE_TRIES):
            watch = _SaveWatch(self.command.run, self.workers)
            if not wait_until(watch.has_begun, process):
                return
            if not self._kill_one_of(watch.pids):
                continue
            self.seen |= watch.with_children
            # The others end with it; only then is it certain that nobody completes the checkpoint.
            wait_until(lambda pids=set(watch.pids): not alive(pids))
            if not watch.is_whole():
                self.kills["save"] += 1
                return
            self.kills["worker"] += 1

    def _kill_one_of(self, pids: list[int]) -> bool:
        """Whether it was still there to be killed."""
        try:
            os.kill(self.random.choice(pids), signal.SIGKILL)
        except (IndexError, ProcessLookupError):
            return False
        return True


class _SaveWatch:
    """Waits for a save to begin while it knows whom to kill: a save can be shorter than looking through all processes.

    A folder that an earlier kill left without its manifest is no save, until it has gone and comes again.
    """

    def __init__(self, run: RunFolder, workers: Workers) -> None:
        self._run, self._workers, self._left, self._begun = run, workers, unfinished(run), ""
        self.pids: list[int] = []
        self.with_children: set[int] = set()
        self._look_again_at = 0.0

    def has_begun(self) -> bool:
        if time.monotonic() >= self._look_again_at:
            self.pids, self.with_children = self._workers.pids(), self._workers.with_children()
            self._look_again_at = time.monotonic() + 0.5
        now = unfinished(self._run)
        self._left &= now
        self._begun = next(iter(now - self._left), "")
        return bool(self._begun and self.pids)

    def is_whole(self) -> bool:
        return is_whole(self._run, self._begun)


def assert_nothing_is_left(run: RunFolder, chaos: TrainChaos, shared_memory_before: set[str]) -> None:
    """No worker, nothing that a worker started, no piece of a checkpoint, no shared memory of ours."""
    wait_until(lambda: not chaos.workers.pids() and not alive(chaos.seen))
    assert orphans(run) == []
    assert shared_memory() - shared_memory_before == set()


def shared_memory() -> set[str]:
    """Names of shared memory that Python or torch has made."""
    return {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "torch_", "coca"))}
