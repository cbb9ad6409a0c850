"""Chaos: one of a run's workers is killed again and again; the run has to finish all the same, and lose little.

Trains `scenes` on 600 small pictures, on 2 workers, for about as long as asked; every --every-s seconds SIGKILL to one
of them, drawn by a seed. Then it looks:

- each step is in metrics.jsonl once, with the digest that an order computed afresh gives its batch: every sample once,
  in its place;
- goodput as the run accounts for it (`coca.goodput`): time on new steps over wall-clock time since the command;
- no worker, nothing that a worker started, no shared memory and no piece of a checkpoint is left.

Prints one JSON row; exits with 1 where one of these does not hold, or where fewer were killed than the time asks for.

Run: python benchmarks/chaos.py [--minutes 15] [--every-s 60] [--steps N]
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from coca.dataset import Dataset
from coca.feed import batch_digest, lane_digest
from coca.goodput import read_goodput
from coca.mixture import Mixture, Source
from coca.run_folder import RunFolder
from coca.tokenizer import train_bpe
from coca.train_config import TrainConfig
from jobs.cluster import connect, disconnect
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig
from jobs.recipes import recipe
from tests.jobs.train_killing import TrainCommand, Workers, alive, orphans, shared_memory, wait_until
from tests.stored_dataset import publish, row

CALIBRATION_STEPS, SETTLE_S = 40, 60.0
COLOURS = ("red", "green", "blue", "white", "black", "yellow")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="about how long the run lasts, with its kills")
    parser.add_argument("--every-s", type=float, default=60.0)
    parser.add_argument("--steps", type=int, help="of the run; by default as many as fit, by a short run without kills")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    cluster = connect(num_cpus=4)
    try:
        with tempfile.TemporaryDirectory() as folder:
            workers = Workers(cluster.address)
            os.environ["RAY_ADDRESS"] = cluster.address
            dataset = make_dataset(Path(folder))
            steps = options.steps or steps_for(options.minutes, dataset, Path(folder))
            found = chaos(options, dataset, steps, Path(folder), workers)
            print(json.dumps(found))
            if failed := failures(found, options.every_s):
                sys.exit(f"error: {'; '.join(failed)}")
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        disconnect()


def make_dataset(folder: Path) -> Dataset:
    names = [f"a {colour} picture number {number}" for colour in COLOURS for number in range(100)]
    files = [[row(name.replace(" ", "-"), name) for name in names[start::6]] for start in range(6)]
    return publish(folder / "dataset", train_bpe(names, vocab_size=400), *files, config={})


def command(dataset: Dataset, folder: Path, name: str, steps: int) -> TrainCommand:
    changes: dict[str, Any] = {"steps": steps, "checkpoint_every": 10, "log_every": 1}
    config = TrainRunConfig(
        data=(DataConfig(uri=dataset.store.uri),),
        out=str(folder / name),
        train=recipe("scenes").model_copy(update=changes),
        workers=WorkersConfig(count=2, cpus=0.5),
    )
    return TrainCommand(config, folder)


def steps_for(minutes: float, dataset: Dataset, folder: Path) -> int:
    """As many as take four fifths of the time without kills."""
    calibration = command(dataset, folder, "calibration", CALIBRATION_STEPS)
    calibration.finish(calibration.start())
    account = read_goodput(calibration.run.store)
    assert account is not None
    return max(CALIBRATION_STEPS, int(0.8 * minutes * 60 * CALIBRATION_STEPS / account["seconds"]["new_steps"]))


def failures(found: dict[str, Any], every_s: float) -> list[str]:
    """What of a row is not as it has to be."""
    wanted = int(found["minutes"] * 60 / every_s) - 1  # the last may come when the workers have ended
    failed = [f"{found['kills']} kills, not {wanted}"] if found["kills"] < wanted else []
    return failed + [
        f"{name}: {found[name]}" for name in ("wrong_steps", "survivors", "orphans", "shared_memory") if found[name]
    ]


def chaos(options: argparse.Namespace, dataset: Dataset, steps: int, folder: Path, workers: Workers) -> dict[str, Any]:
    trained, shared_before = command(dataset, folder, "run", steps), shared_memory()
    started, kills, seen = time.monotonic(), 0, set[int]()
    chance, ended = random.Random(options.seed), threading.Event()
    process = trained.start()

    def kill_on_time() -> None:
        """Keeps to the clock: waiting for workers that come back puts off no later kill."""
        nonlocal kills
        while not ended.wait(max(0.0, started + (kills + 1) * options.every_s - time.monotonic())):
            try:
                if not wait_until(workers.pids, process):
                    return
                seen.update(workers.with_children())
                pid = chance.choice(workers.pids())
                os.kill(pid, signal.SIGKILL)
            except (IndexError, ProcessLookupError, TimeoutError) as error:  # it had gone by itself: another one
                print(f"nothing killed: {error!r}", file=sys.stderr)
                continue
            kills += 1
            print(f"killed worker {pid} at step {trained.newest_step()}", file=sys.stderr)

    threading.Thread(target=kill_on_time, daemon=True).start()
    stdout, _ = process.communicate()
    ended.set()
    minutes = (time.monotonic() - started) / 60
    if process.returncode != 0:
        sys.exit(f"the run failed: {trained.log()}")
    account = read_goodput(trained.run.store)
    assert account is not None
    return {
        "minutes": round(minutes, 1),
        "kills": kills,
        "steps": json.loads(stdout.strip().splitlines()[-1])["steps"],
        "goodput": round(account["goodput"], 3),
        "seconds": {cause: round(seconds, 1) for cause, seconds in account["seconds"].items()},
        "attempts": len(account["attempts"]),
        "wrong_steps": wrong_steps(trained.run, dataset, steps),
        "survivors": survivors(workers, seen),
        "orphans": orphans(trained.run),
        "shared_memory": sorted(shared_memory() - shared_before),
        "load": os.getloadavg()[0],
    }


def survivors(workers: Workers, seen: set[int]) -> list[int]:
    """Workers and what they had started that are still there, a while after the command's end."""
    ends_at = time.monotonic() + SETTLE_S
    while (left := alive(seen) | set(workers.pids())) and time.monotonic() < ends_at:
        time.sleep(0.2)
    return sorted(left)


def wrong_steps(run: RunFolder, dataset: Dataset, steps: int) -> list[int]:
    """Steps that are missing, twice there, or of another batch than the order says."""
    config: TrainConfig = recipe("scenes")
    order = Mixture([Source(dataset)]).order(config)
    ids = [dataset.read_row_group(place)["sample_id"].to_pylist() for place in range(dataset.row_groups.num_rows)]
    rows: dict[int, list[str]] = {}
    for each in run.read_metrics():
        rows.setdefault(each["step"], []).append(each["batch_digest"])
    wrong = []
    for number in range(steps):
        lanes = [
            [ids[ref.row_group][ref.row] for ref in order.lane_batch(lane, number)] for lane in range(config.lanes)
        ]
        if rows.get(number + 1) != [batch_digest([lane_digest(lane) for lane in lanes])]:
            wrong.append(number + 1)
    return wrong


if __name__ == "__main__":
    main()
