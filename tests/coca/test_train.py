"""Training without Ray: it learns, and stopping and going on changes nothing."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coca.checkpoint import list_checkpoints, load_checkpoint
from coca.dataset import Dataset
from coca.errors import BadInput, RunFailed
from coca.run_folder import RunFolder
from coca.train import check_same_run, fixed_fields, train
from coca.train_config import AugmentConfig, LossConfig, OptimizerConfig, TrainConfig

MakeDataset = Callable[..., Dataset]
FIELDS = ["step", "samples_seen", "batch_digest", "loss", "contrastive_loss", "captioning_loss", "learning_rate"]
FIELDS += ["grad_norm"]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(config: TrainConfig, dataset: Dataset, folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return train(config, dataset, RunFolder(folder), device=torch.device("cpu"), report=lambda row: None, **options)


def metrics(folder: Path) -> list[dict[str, Any]]:
    rows = RunFolder(folder).read_metrics()
    assert [list(row)[: len(FIELDS)] for row in rows] == [FIELDS] * len(rows)
    return [{name: row[name] for name in FIELDS} for row in rows]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resume_equals_straight_through(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig, optimizer: str
) -> None:
    dataset = make_dataset()
    config = tiny_train.model_copy(update={"optimizer": OptimizerConfig(name=optimizer)})  # type: ignore[arg-type]
    run(config, dataset, tmp_path / "straight")
    # Stopped after steps 1, 2, ... : some fall on a checkpoint, some between two.
    for _ in range(3):
        calls = iter([False, True])
        run(config, dataset, tmp_path / "stopped", should_stop=lambda calls=calls: next(calls))
    result = run(config, dataset, tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    weights = [load_checkpoint(str(tmp_path / name)).model.state_dict() for name in ("straight", "stopped")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert result["steps"] == 6


def test_steps_after_the_checkpoint_are_replayed_and_replace_their_lines(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    dataset = make_dataset()
    run(tiny_train, dataset, tmp_path)
    expected = metrics(tmp_path)
    RunFolder(tmp_path).store.delete("checkpoints/step_000000006")
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "lo')  # what a kill leaves
    run(tiny_train, dataset, tmp_path)
    assert metrics(tmp_path) == expected


def test_a_finished_run_does_nothing(tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    dataset = make_dataset()
    first = run(tiny_train, dataset, tmp_path)
    again = run(tiny_train, dataset, tmp_path)
    assert again["final_loss"] == first["final_loss"]
    assert again["samples_per_s"] is None
    assert len(metrics(tmp_path)) == 6


def test_it_learns(tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    optimizer = OptimizerConfig(name="muon", learning_rate=5e-3)
    config = tiny_train.model_copy(update={"steps": 60, "checkpoint_every": 60, "optimizer": optimizer})
    run(config, make_dataset(), tmp_path)
    rows = metrics(tmp_path)
    assert rows[-1]["captioning_loss"] < rows[0]["captioning_loss"] / 4


def test_a_changed_config_is_refused_by_name(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    dataset = make_dataset()
    run(tiny_train, dataset, tmp_path)
    changed = tiny_train.model_copy(update={"loss": LossConfig(captioning_weight=1.0)})
    with pytest.raises(BadInput, match=r"started with loss.captioning_weight = 2.0, now it is 1.0"):
        run(changed, dataset, tmp_path)


def test_another_dataset_is_refused_by_what_differs(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    """The tokenizer first, then the version, then the rows: digests of files tell a user nothing."""
    saved = fixed_fields(tiny_train, make_dataset())
    folder = RunFolder(tmp_path / "run")
    check_same_run(saved, saved, folder)
    with pytest.raises(BadInput, match=r"on tokens of the tokenizer [0-9a-f]{16}, this dataset was written by other"):
        check_same_run(saved, saved | {"data.tokenizer": "other", "data.row_groups": "x", "data.version": 2}, folder)
    with pytest.raises(BadInput, match=r"started with data.version = 1, now it is 2"):
        check_same_run(saved, saved | {"data.row_groups": "x", "data.version": 2}, folder)
    with pytest.raises(BadInput, match=r"was started on another dataset. Give the dataset it was started with"):
        check_same_run(saved, saved | {"data.row_groups": "x"}, folder)


@pytest.mark.parametrize(("log_every", "checkpoint_every"), [(1, 2), (6, 1)])
def test_a_loss_that_is_not_finite_ends_the_run_and_reaches_no_checkpoint(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig, log_every: int, checkpoint_every: int
) -> None:
    changes = {"log_every": log_every, "checkpoint_every": checkpoint_every}
    config = tiny_train.model_copy(update={"optimizer": OptimizerConfig(learning_rate=1e30), **changes})
    with pytest.raises(RunFailed, match=r"step \d: loss .*nan"):
        run(config, make_dataset(), tmp_path)
    steps = list_checkpoints(RunFolder(tmp_path).store)
    assert not steps or load_checkpoint(str(tmp_path)).model.log_logit_scale.isfinite()


def test_only_the_newest_checkpoints_are_kept(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    (tmp_path / "checkpoints/best").mkdir(parents=True)  # somebody's own
    (tmp_path / "checkpoints/step_000000001").mkdir()  # a save that was cut off
    run(tiny_train.model_copy(update={"checkpoint_every": 1}), make_dataset(), tmp_path)
    assert RunFolder(tmp_path).store.list("checkpoints") == ["best", "step_000000005", "step_000000006"]


RANK_SCRIPT = """
import os, sys, traceback, torch, torch.distributed as dist
from coca.train_config import TrainConfig
from coca.dataset import Dataset
from coca.run_folder import RunFolder
from coca.train import train
torch.set_num_threads(1)
dist.init_process_group("gloo")
config = TrainConfig.model_validate_json(sys.argv[1])
run = RunFolder(sys.argv[3 + int(os.environ["RANK"])])
try:
    train(config, Dataset(sys.argv[2]), run, device=torch.device("cpu"), report=lambda row: None)
    dist.destroy_process_group()
except Exception:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)  # torch's store sometimes aborts in an interpreter that ends after its peers
"""


def run_ranks(config: TrainConfig, dataset: Dataset, *folders: Path) -> list[tuple[int, str]]:
    """(exit code, last line of stderr) of one rank for each run folder."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-c", RANK_SCRIPT, config.model_dump_json(), dataset.store.uri, *folders]
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(folders))}
    ranks = [
        subprocess.Popen(command, env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(len(folders))
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    return [(rank.returncode, error.strip().rpartition("\n")[2]) for rank, error in zip(ranks, errors, strict=True)]


def test_ranks_that_see_different_checkpoints_stop(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    """Folders that are not shared, or not yet: going on would mix two positions without a word."""
    dataset = make_dataset()
    run(tiny_train.model_copy(update={"steps": 2}), dataset, tmp_path / "mine")
    for code, line in run_ranks(tiny_train, dataset, tmp_path / "mine", tmp_path / "theirs"):
        assert code == 1
        assert "the workers see different checkpoints" in line
        assert "newest steps [-1, 2]" in line


def test_two_ranks_train_as_one(tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    """The same batches exactly, the same losses and gradients up to the order of summation."""
    dataset = make_dataset()
    run(tiny_train, dataset, tmp_path / "one")
    assert run_ranks(tiny_train, dataset, tmp_path / "two", tmp_path / "two") == [(0, ""), (0, "")]
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one["batch_digest"] == two["batch_digest"]
        for name in ("loss", "contrastive_loss", "captioning_loss", "grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=1e-4), (one["step"], name)


def test_a_run_resumes_exactly_with_every_option_of_the_model_and_the_losses(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    dataset = make_dataset()
    config = tiny_train.model_copy(
        update={
            "model": tiny_train.model.model_copy(update={"initial_logit_bias": -10.0, "pooling": "parallel"}),
            "loss": LossConfig(contrastive="sigmoid", repeated_captions="ignored", label_smoothing=0.1),
            "augment": AugmentConfig(patch_dropout=0.5),
            "activation_checkpointing": True,
            "precision": "bfloat16",
        }
    )
    run(config, dataset, tmp_path / "straight")
    run(config, dataset, tmp_path / "stopped", should_stop=lambda: True)
    run(config, dataset, tmp_path / "stopped")
    assert len(metrics(tmp_path / "straight")) == 6
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")


def test_metrics_are_json_lines(tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    run(tiny_train, make_dataset(), tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(row["samples_per_s"] > 0 for row in rows)
