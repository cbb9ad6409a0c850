"""Killing a refresh: its command in a process of its own, the processes around it, a reader, and what to compare."""

import hashlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from coca.contract import VersionRecord
from coca.dataset import Dataset, list_versions
from coca.storage import Store
from pipelines.config import RefreshConfig
from pipelines.tables import open_table
from tests.process_table import processes

ROOT = Path(__file__).parents[2]
LOADED_MACHINE_S = 240

# Links of one host in several parts, so that its limits are leased, and answers that take a while.
SLOW = {
    "allow_networks": ["127.0.0.0/8"],
    "connections_per_domain": 2,
    "workers": 2,
    "decode_processes": 1,
    "retries": 1,
    "backoff_s": 0.01,
    "timeout_s": 5.0,
    "lease_s": 1.0,
}

# What the clock decides.
_TIMES = {"fetched_at", "event_at", "next_check_at"}


def links(web: Any, pages: Any, count: int, delay_s: float = 0.0) -> list[tuple[str | None, str | None]]:
    for number in range(count):
        body = pages.picture(f"{number % (count - 3)}")  # three pictures lie under two urls
        web.pages[f"/{number}"] = pages.answer(200, body, "Content-Type: image/jpeg", delay_s=delay_s)
    web.pages["/500"] = pages.answer(500)
    pairs: list[tuple[str | None, str | None]] = [(f"/{number}", f"picture {number}") for number in range(count)]
    return [*pairs, ("/0", "another caption"), ("/500", "an error"), ("/404", "a dead link"), (None, "no url")]


def published(dataset: str) -> dict[str, Any]:
    """All that the latest version says and holds, but for the clock; and every file that lies in the folder."""
    opened = Dataset(dataset)
    tables = {}
    for name in ("samples", "annotations", "links"):
        table = open_table(opened.store, name, getattr(opened.record, name).delta_version)
        rows = table.to_pyarrow_table().to_pylist()
        plain = [{key: value for key, value in row.items() if key not in _TIMES} for row in rows]
        tables[name] = sorted(plain, key=lambda row: (row["sample_id"], str(row)))
    return {
        "tables": tables,
        "row_groups": opened.row_groups.to_pylist(),
        "record": comparable(opened.record),
        "files": [
            path for path in files_of(opened.store) if "_delta_log" not in path and not path.startswith("leases")
        ],
        "tokens": [opened.read_row_group(i)["tokens"].to_pylist() for i in range(opened.row_groups.num_rows)],
    }


def comparable(record: VersionRecord) -> dict[str, Any]:
    values = record.model_dump()
    values["config"]["to"] = values["created_at"] = None
    values["code_version"] = None  # asked of git by each process: a commit during a long test changes it
    for name in ("samples", "annotations", "links"):
        del values[name]["delta_version"]  # a roll-back is a commit too
    return values


def files_of(store: Store) -> list[str]:
    found = store.filesystem.get_file_info(pafs.FileSelector(store.path(), recursive=True, allow_not_found=True))
    return sorted(info.path[len(store.path()) + 1 :] for info in found if info.is_file)


def copy_dataset(source: str, target: str) -> None:
    pafs.copy_files(
        Store(source).path(),
        Store(target).path(),
        source_filesystem=Store(source).filesystem,
        destination_filesystem=Store(target).filesystem,
        use_threads=False,
    )


class Command:
    """``coca data refresh`` with a config, to be run as often as it is killed."""

    def __init__(self, config: RefreshConfig, folder: Path, **environment: str) -> None:
        self.path = folder / f"{hashlib.sha256(config.to.encode()).hexdigest()[:12]}.yaml"
        self.path.write_text(config.to_yaml())
        self._environment = os.environ | environment

    def start(self) -> "subprocess.Popen[str]":
        arguments = [sys.executable, "-m", "jobs.cli", "data", "refresh", "--config", str(self.path)]
        return subprocess.Popen(
            arguments, env=self._environment, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self) -> "subprocess.CompletedProcess[str]":
        with self.start() as process:
            stdout, stderr = process.communicate(timeout=LOADED_MACHINE_S)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


@dataclass(frozen=True)
class Cluster:
    """The processes of one Ray, by the address of its control plane: others run on the same machine."""

    address: str

    def actors(self, name: str) -> list[int]:
        """Processes of actors of a class."""
        raylets = [pid for pid, _, line in processes() if "raylet" in line and f"--gcs-address={self.address}" in line]
        return [pid for pid, parent, line in processes() if parent in raylets and line.startswith(f"ray::{name}")]

    def decoders(self) -> list[int]:
        actors = self.actors("MapWorker(Map(FetchPart))")
        return [pid for pid, parent, line in processes() if parent in actors and "pipelines.decode_worker" in line]

    def victims(self, target: str) -> list[int]:
        match target:
            case "actor":
                return self.actors("MapWorker(Map(FetchPart))")
            case "decoder":
                return self.decoders()
            case "leases":
                return self.actors("RateLeases")
        raise ValueError(target)


def wait_until(moment: Callable[[], Any], process: "subprocess.Popen[str]", timeout_s: float = 120) -> Any:
    """What ``moment`` gives once that is true; None where the process has ended first."""
    ends_at = time.monotonic() + timeout_s
    while time.monotonic() < ends_at:
        found = moment()
        if found:
            return found
        if process.poll() is not None:
            return None
        time.sleep(0.01)
    raise TimeoutError


def kill_driver(process: "subprocess.Popen[str]") -> bool:
    """Whether it died of it: it may have ended before."""
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def kill_one(pids: list[int]) -> bool:
    try:
        os.kill(pids[0], signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


@dataclass
class Chaos:
    """Kills at random moments, counted by target."""

    cluster: Cluster
    random: random.Random
    within_s: float = 2.0
    """Of its appearance, when a process is killed."""
    kills: Counter[str] = field(default_factory=Counter)

    def run(self, command: Command, targets: list[str], driver_lives_s: float) -> None:
        """Run a command, kill each target once in turn, start it again where that was the driver; then complete it."""
        process = command.start()
        try:
            for target in targets:
                if target == "driver":
                    wait_until(self._after(self.random.uniform(0.5, driver_lives_s)), process)
                    self.kills[target] += kill_driver(process)
                    process = command.start()
                elif victims := wait_until(lambda target=target: self.cluster.victims(target), process):
                    wait_until(self._after(self.random.uniform(0.0, self.within_s)), process)
                    self.kills[target] += kill_one(self.cluster.victims(target) or victims)
                    time.sleep(0.5)
            _, stderr = process.communicate(timeout=LOADED_MACHINE_S)
            assert process.returncode == 0, stderr
        finally:
            process.kill()

    def _after(self, seconds: float) -> Callable[[], bool]:
        ends_at = time.monotonic() + seconds
        return lambda: time.monotonic() >= ends_at


class Reader:
    """Somebody who opens and reads every version, over and over, while a refresh runs and dies."""

    def __init__(self, dataset: str) -> None:
        self._dataset, self._ends = dataset, threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.rows: dict[int, tuple[str, ...]] = {}
        """Version -> ids of all stored rows; a version never changes."""
        self.failures: list[str] = []
        self.rounds = 0

    def __enter__(self) -> "Reader":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ends.set()
        self._thread.join()

    def _read(self) -> None:
        while not self._ends.is_set():
            try:
                self._read_all()
            except Exception as error:  # whatever a reader meets is what the test is about
                self.failures.append(f"{type(error).__name__}: {error}")
            self.rounds += 1
            self._ends.wait(0.1)

    def _read_all(self) -> None:
        for version in [*list_versions(Store(self._dataset)), None]:
            dataset = Dataset(self._dataset, version)
            groups = [
                dataset.read_row_group(i, only_selected=False)["sample_id"].to_pylist()
                for i in range(dataset.row_groups.num_rows)
            ]
            rows = tuple(sorted(each for group in groups for each in group))
            if len(set(rows)) != len(rows):
                self.failures.append(f"version {dataset.record.version} has a sample twice")
            if self.rows.setdefault(dataset.record.version, rows) != rows:
                self.failures.append(f"version {dataset.record.version} has changed")


KILLS = 15
ROUNDS = [
    ["driver", "actor", "driver"],
    ["decoder", "driver", "leases"],
    ["actor", "decoder", "actor"],
    ["driver", "driver", "driver"],
    ["leases", "actor", "driver"],
    ["decoder", "leases", "driver", "actor"],
]


def soak(
    build: Callable[..., RefreshConfig], web: Any, pages: Any, root: str, address: str, folder: Path, capsys: Any
) -> None:
    """Every round a copy of a published dataset, refreshed under kills and read all the while."""
    web.pages["/base"] = pages.image("base")
    base = build([("/base", "in the first version")], to=f"{root}-base", fetch=SLOW)
    assert Command(base, folder, RAY_ADDRESS=address).run().returncode == 0
    pairs = links(web, pages, 90, delay_s=0.2)
    config = build(pairs, to=f"{root}-undisturbed", publish={"links_per_part": 10, "links_per_batch": 30}, fetch=SLOW)
    copy_dataset(base.to, config.to)
    started_s = time.monotonic()
    assert Command(config, folder, RAY_ADDRESS=address).run().returncode == 0
    lasts_s = time.monotonic() - started_s
    expected = published(config.to)
    chaos, rounds_read = Chaos(Cluster(address), random.Random(7)), 0
    for number, targets in enumerate(itertools.islice(itertools.cycle(ROUNDS), 3 * len(ROUNDS))):
        if number >= len(ROUNDS) and chaos.kills.total() >= KILLS:
            break
        again = config.model_copy(update={"to": f"{root}-{number}"})
        copy_dataset(base.to, again.to)
        with Reader(again.to) as reader:
            chaos.run(Command(again, folder, RAY_ADDRESS=address), targets, lasts_s)
        assert published(again.to) == expected, f"round {number}: {targets}"
        assert (reader.failures, sorted(reader.rows)) == ([], [1, 2])
        rounds_read += reader.rounds
    with capsys.disabled():
        print(f"\n{root}: {dict(chaos.kills)}, {chaos.kills.total()} kills; read whole {rounds_read} times", end=" ")
    assert chaos.kills.total() >= KILLS
    assert {"driver", "actor", "decoder", "leases"} == chaos.kills.keys()
