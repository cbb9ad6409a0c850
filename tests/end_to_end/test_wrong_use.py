"""Wrong use as a user meets it, on the real console entry: exit code 2 and one line with the cause and the way out.

``RAY_ADDRESS`` names a port where nobody answers, so that no case starts a Ray, and one that asked for Ray before it
saw what is wrong would say something else.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from coca.contract import ANNOTATIONS, LINKS, SAMPLES
from coca.dataset import Dataset
from coca.run_folder import RunFolder
from coca.tokenizer import Tokenizer, train_bpe
from coca.train_config import TrainConfig
from tests.training import train_alone

NOBODY = "127.0.0.1:1"
Answer = Future[subprocess.CompletedProcess[str]]
TRAIN = "train --recipe scenes --set train.lanes=4 --out new"
TUNE = "tune --recipe scenes --set train.lanes=4 --out new"
CASES = [
    # --- a file that is missing, or no such thing
    ("tokenizer train --from none.csv --out t.json", "the links table none.csv does not exist. Give a Parquet, CSV"),
    ("tokenizer train --from links.csv --out links.csv/t.json", "links.csv is a file. Give a folder"),
    ("tokenizer train --from links.csv --out run", "--out run is a folder. Name a file in it: run/tokenizer.json"),
    ("data refresh --links links.csv --to links.csv --tokenizer t.json", "--to .*links.csv is a file. Give a folder"),
    ("data refresh --links none.csv --to new --tokenizer t.json", "links table none.csv does not exist. Give a"),
    ("data refresh --links links.csv --to new", "new is new and has no tokenizer yet. Train one with `coca tokenizer"),
    ("data refresh --links links.csv --to new --tokenizer links.csv", "links.csv is not a tokenizer file.* Train one"),
    ("data show none", "none holds no published dataset version. Make one with `coca data refresh"),
    (f"{TRAIN} --data none", "none holds no published dataset version. Make one with `coca data refresh"),
    (f"{TRAIN} --data links.csv", "links.csv holds no published dataset version. Make one"),
    (f"{TRAIN} --data damaged", "tokenizers/.* is missing. The dataset is damaged: restore"),
    (f"{TRAIN} --data dataset --out links.csv/run", "links.csv is a file. Give a folder"),
    (f"{TRAIN} --data dataset --config none.yaml", "cannot read the config file none.yaml: No such file"),
    (f"{TRAIN} --data dataset --recipe large", "no recipe 'large'. Known are .*scenes"),
    (f"{TUNE} --data none --held-out held_out.parquet", "none holds no published dataset version. Make one"),
    (f"{TUNE} --data dataset --held-out none.parquet", "no evaluation set none.parquet. Give "),
    ("evaluate caption --checkpoint run --data none.parquet", "no evaluation set none.parquet. Give --data"),
    ("evaluate caption --checkpoint run --data dataset", "cannot read the evaluation set dataset: .* Give --data"),
    ("evaluate caption --checkpoint none --data held_out.parquet", "none is not a checkpoint.* Name a folder that"),
    ("serve --checkpoint none", "none is not a checkpoint: it holds no manifest.json. Name a folder that `coca train`"),
    ("demo --out links.csv", "links.csv .* Give"),
    # --- an unknown column
    (
        "tokenizer train --from links.csv --column text --out t.json",
        "no column 'text'. Did you mean 'caption'.* --column",
    ),
    ("data refresh --links links.csv --caption-column text --to new --tokenizer t.json", "no column 'text'.*caption"),
    (f"{TUNE} --data dataset --held-out columns.parquet", "no column 'captions', only image. An evaluation set has"),
    ("evaluate retrieve --checkpoint run --data columns.parquet", "no column 'captions', only image. An evaluation"),
    # --- an empty table
    ("tokenizer train --from empty.csv --out t.json", "'caption' of empty.csv holds no captions. Give a table with"),
    ("data refresh --links empty.csv --to new --tokenizer t.json", "empty.csv has no rows. Give one with"),
    (f"{TRAIN} --data unselected", "unselected version 1 has no selected samples. Refresh it"),
    (f"{TUNE} --data dataset --held-out empty.parquet", "empty.parquet has no rows. Give "),
    ("evaluate caption --checkpoint run --data empty.parquet", "empty.parquet has no rows. Give --data a set"),
    # --- an unknown config key, a value that breaks a rule
    ("data refresh --links links.csv --to new --set fetch.timeout=3", "'fetch.timeout'. Did you mean 'timeout_s'"),
    (f"{TRAIN} --data dataset --set train.step=3", "'train.step'. Did you mean 'steps'"),
    (
        f"{TRAIN} --data dataset --version 0",
        "'data.0.version' = 0: Input should be greater than 0. See `coca config explain",
    ),
    (f"{TRAIN} --data dataset --workers 3", "3 workers do not divide lanes = 4. Use 1, 2 or 4 workers"),
    (f"{TRAIN} --data dataset --set train.lanes=24", "9 row groups .* lanes = 24. Set train.lanes=8, or write smaller"),
    (f"{TUNE} --data dataset --held-out held_out.parquet --set trails=3", "'trails'. Did you mean 'trials'"),
    (f"{TUNE} --data dataset --held-out held_out.parquet --set smallest_weight=9", "9 is above largest_weight = 4"),
    ("serve --checkpoint run --set max_batch=3", "'max_batch'. Did you mean 'max_batch_size'"),
    ("config show train --set train.step=3", "'train.step'. Did you mean 'steps'"),
    ("config show training", "'training' is not one of .*'train'"),
    ("config explain train.step", "no setting 'train.step'. Did you mean 'train.steps'"),
    ("demo --out new --set step=3", "'step'. Did you mean 'steps'"),
    ("submit -- trian", "unknown command 'trian'. Did you mean `coca submit -- train`"),
    # --- a dataset written by another tokenizer
    (
        "data refresh --links links.csv --to dataset --tokenizer other.json",
        "dataset was written by .* Leave --tokenizer",
    ),
    (f"{TRAIN} --data other --out run", "run was started on tokens of the tokenizer .* Give the dataset it was"),
    # --- a port that is taken, a cluster that does not answer
    ("serve --checkpoint run --port {port}", "port .* is taken. Stop its server or give --port"),
    (f"{TRAIN} --data dataset", f"no Ray cluster answers at RAY_ADDRESS={NOBODY}.* unset RAY_ADDRESS to have"),
    (f"submit --address http://{NOBODY} -- doctor", f"nothing answers at http://{NOBODY}.* Give the URL"),
    # --- a broken checkpoint
    ("evaluate caption --checkpoint broken --data held_out.parquet", "model.safetensors does not match .* use another"),
    ("serve --checkpoint broken", "model.safetensors does not match its SHA-256 in the manifest. .* use another"),
    (f"{TRAIN} --data dataset --out broken", "no whole checkpoint to go on from: .*resume.json .* Put a copy"),
    ("serve --checkpoint begun", "begun has no whole checkpoint yet. Start its `coca train` again"),
]


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory,
    publish_dataset: Callable[..., Dataset],
    tokenizer: Tokenizer,
    tiny_train: TrainConfig,
) -> Path:
    """Where the user stands: sound things, and one of each that is not."""
    here = tmp_path_factory.mktemp("user")
    other = train_bpe(["something else"], vocab_size=262)
    write_tables(here)
    (here / "t.json").write_text(tokenizer.to_json())
    (here / "other.json").write_text(other.to_json())
    dataset = publish_dataset(here / "dataset", tokenizer)
    publish_dataset(here / "other", other)
    publish_dataset(here / "unselected", tokenizer, files=(4,), unselected=(0, 1, 2, 3))
    publish_dataset(here / "damaged", tokenizer)
    shutil.rmtree(here / "damaged/tokenizers")
    for name, schema in {"samples": SAMPLES, "annotations": ANNOTATIONS, "links": LINKS}.items():
        for _ in range(2):  # the record names Delta version 1
            write_deltalake(here / "dataset" / name, schema.empty_table(), mode="append")
    run = RunFolder(here / "run")
    train_alone(tiny_train.model_copy(update={"steps": 1}), dataset, run)
    shutil.copytree(here / "run", here / "broken")
    weights = next((here / "broken").rglob("model.safetensors"))
    for part in (weights, weights.with_name("resume.json")):
        part.write_bytes(part.read_bytes()[:-1])
    (here / "begun").mkdir()
    (here / "begun/config.yaml").write_text("steps: 3\n")
    return here


def write_tables(here: Path) -> None:
    (here / "links.csv").write_text("url,caption\nhttp://example.com/1.jpg,a red circle\n")
    (here / "empty.csv").write_text("url,caption\n")
    sound = pa.table({"image": [b"picture"], "captions": [["a red circle"]]})
    pq.write_table(sound, here / "held_out.parquet")
    pq.write_table(sound.slice(0, 0), here / "empty.parquet")
    pq.write_table(sound.select(["image"]), here / "columns.parquet")


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def answers(request: pytest.FixtureRequest, folder: Path, taken_port: int) -> Iterator[dict[str, Answer]]:
    """What the commands of the chosen cases say, by command: most of the time each imports, so two run at a time."""
    chosen = [item.callspec.params["command"] for item in request.session.items if item.path == request.path]
    with ThreadPoolExecutor(2) as pool:
        yield {command: pool.submit(run, command.format(port=taken_port), folder) for command in chosen}
        pool.shutdown(cancel_futures=True)


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jobs.cli", *command.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"RAY_ADDRESS": NOBODY},
    )


@pytest.mark.parametrize(("command", "expected"), CASES, ids=[command for command, _ in CASES])
def test_wrong_use_gets_exit_code_2_and_one_line(
    answers: dict[str, Answer], folder: Path, command: str, expected: str
) -> None:
    done = answers[command].result()
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(rf"error: .*{expected}.*[.?]\n", done.stderr), done.stderr
    assert not (folder / "new").exists(), "nothing is left behind"
