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
from coca.train_config import (
    AugmentConfig,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    ResolutionPhase,
    TrainConfig,
)
from tests.training import train_alone

pytestmark = pytest.mark.usefixtures("one_thread")

MakeDataset = Callable[..., Dataset]
FIELDS = ["step", "samples_seen", "batch_digest", "loss", "contrastive_loss", "captioning_loss", "learning_rate"]
FIELDS += ["grad_norm", "temperature", "skipped_steps"]


def run(config: TrainConfig, dataset: Dataset, folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    return train_alone(config, dataset, RunFolder(folder), **options)


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


def test_steps_without_finite_gradients_change_nothing_and_end_the_run_after_a_limit(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    optimizer = OptimizerConfig(learning_rate=1e30, max_skipped_steps=3)
    config = tiny_train.model_copy(update={"optimizer": optimizer, "checkpoint_every": 1, "steps": 9})
    with pytest.raises(RunFailed, match=r"step \d: the gradients are no finite numbers, in 4 steps so far; .*0{28}"):
        run(config, make_dataset(), tmp_path)
    rows = RunFolder(tmp_path).read_metrics()
    assert [row["skipped_steps"] for row in rows[-3:]] == [1, 2, 3]
    assert load_checkpoint(str(tmp_path)).step == rows[-1]["step"]
    with pytest.raises(RunFailed, match="in 4 steps so far"):  # the count goes on with the run
        run(config, make_dataset_again(tmp_path), tmp_path)


def make_dataset_again(folder: Path) -> Dataset:
    return Dataset(str(folder / "dataset"))


def test_only_the_newest_checkpoints_are_kept(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    (tmp_path / "checkpoints/best").mkdir(parents=True)  # somebody's own
    (tmp_path / "checkpoints/step_000000001").mkdir()  # a save that was cut off
    run(tiny_train.model_copy(update={"checkpoint_every": 1}), make_dataset(), tmp_path)
    assert RunFolder(tmp_path).store.list("checkpoints") == ["best", "step_000000005", "step_000000006"]


RANK_SCRIPT = """
import os, sys, traceback, torch, torch.distributed as dist
from coca.dataset import Dataset
from coca.decode import make_decoder
from coca.feed import Feed
from coca.mixture import Mixture, Source
from coca.run_folder import RunFolder
from coca.same_run import fit_to_tokenizer
from coca.train import train
from coca.train_config import FeedConfig, TrainConfig
torch.set_num_threads(1)
dist.init_process_group("gloo")
config = TrainConfig.model_validate_json(sys.argv[1])
run = RunFolder(sys.argv[3 + int(os.environ["RANK"])])
try:
    mixture, feed = Mixture([Source(Dataset(sys.argv[2]))]), FeedConfig(decode="threads", decode_workers=1)
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    decoder = make_decoder(feed, config.augment, config.seed)
    source = Feed(mixture, fit_to_tokenizer(config, mixture.tokenizer), feed, decoder=decoder, **place)
    train(config, mixture, run, batches=source.batches, device=torch.device("cpu"))
    source.close()
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
    run(tiny_train, dataset, tmp_path / "mine", should_stop=iter([False, True]).__next__)
    for code, line in run_ranks(tiny_train, dataset, tmp_path / "mine", tmp_path / "theirs"):
        assert code == 1
        assert "the workers see different checkpoints" in line
        assert "newest steps [-1, 2]" in line


@pytest.mark.parametrize(
    "parallel", [ParallelConfig(), ParallelConfig(kind="fsdp", micro_batches=2)], ids=lambda config: config.kind
)
def test_two_ranks_train_as_one(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig, parallel: ParallelConfig
) -> None:
    """The same batches exactly, the same losses and gradients up to the order of summation; half of it alone."""
    dataset = make_dataset()
    optimizer = OptimizerConfig(name="muon", ema_decay=0.9)
    config = tiny_train.model_copy(update={"parallel": parallel, "optimizer": optimizer})
    run(config, dataset, tmp_path / "one")
    run(config, dataset, tmp_path / "two", should_stop=iter([False, False, True]).__next__)
    assert run_ranks(config, dataset, tmp_path / "two", tmp_path / "two") == [(0, ""), (0, "")]
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


def test_checkpoints_hold_the_size_of_their_phase_and_the_averages(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    """Small pictures first; patches are dropped until the last third; what is saved for use is the average."""
    config = tiny_train.model_copy(
        update={
            "resolutions": (ResolutionPhase(from_step=0, image_size=8), ResolutionPhase(from_step=3, image_size=24)),
            "augment": AugmentConfig(patch_dropout=0.5, unmasked_fraction=0.34),
            "optimizer": OptimizerConfig(name="adafactor", ema_decay=0.5, schedule="warmup_stable_decay"),
            "keep_checkpoints": 9,
        }
    )
    dataset = make_dataset()
    run(config, dataset, tmp_path / "straight")
    run(config, dataset, tmp_path / "stopped", should_stop=iter([False, False, False, True]).__next__)
    run(config, dataset, tmp_path / "stopped")
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    sizes = [
        load_checkpoint(f"{tmp_path}/straight/checkpoints/step_{step:09d}").preprocessing.image_size for step in (2, 4)
    ]
    assert sizes == [8, 24]
    plain = {**config.model_dump(), "optimizer": {**config.optimizer.model_dump(), "ema_decay": None}}
    run(TrainConfig.model_validate(plain), dataset, tmp_path / "raw")
    averaged, raw = (load_checkpoint(str(tmp_path / name)).model.log_logit_scale for name in ("straight", "raw"))
    assert metrics(tmp_path / "raw") == metrics(tmp_path / "straight")
    assert averaged != raw


def test_the_best_checkpoint_is_kept(tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    config = tiny_train.model_copy(
        update={"checkpoint_every": 1, "keep_best": "temperature", "keep_checkpoints": 1, "log_every": 6}
    )
    run(config.model_copy(update={"log_every": 1}), make_dataset(), tmp_path)
    rows = RunFolder(tmp_path).read_metrics()
    best = max(rows, key=lambda row: row["temperature"])["step"]
    assert set(list_checkpoints(RunFolder(tmp_path).store)) == {best, 6}
