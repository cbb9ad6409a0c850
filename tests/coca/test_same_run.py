"""What a resumed run must share, and how it is told what differs."""

from collections.abc import Callable
from pathlib import Path

import pytest

from coca.dataset import Dataset
from coca.errors import BadInput
from coca.mixture import Mixture, Source
from coca.run_folder import RunFolder
from coca.same_run import check_same_run, fixed_fields
from coca.train_config import ParallelConfig, TrainConfig

MakeDataset = Callable[..., Dataset]


def test_another_dataset_is_refused_by_what_differs(
    tmp_path: Path, make_dataset: MakeDataset, tiny_train: TrainConfig
) -> None:
    """The tokenizer first, then the version, then the rows: digests of files tell a user nothing."""
    saved = fixed_fields(tiny_train, Mixture([Source(make_dataset())]))
    folder = RunFolder(tmp_path / "run")
    check_same_run(saved, saved, folder)
    check_same_run(None, saved, folder)
    other = saved | {"data.tokenizer": "other", "data.0.row_groups": "x", "data.0.version": 2}
    with pytest.raises(BadInput, match=r"on tokens of the tokenizer [0-9a-f]{16}, this dataset was written by other"):
        check_same_run(saved, other, folder)
    with pytest.raises(BadInput, match=r"started with data.0.version = 1, now it is 2"):
        check_same_run(saved, saved | {"data.0.row_groups": "x", "data.0.version": 2}, folder)
    with pytest.raises(BadInput, match=r"was started on another dataset. Give the dataset it was started with"):
        check_same_run(saved, saved | {"data.0.row_groups": "x"}, folder)


def test_what_changes_no_number_may_change(make_dataset: MakeDataset, tiny_train: TrainConfig) -> None:
    mixture = Mixture([Source(make_dataset())])
    optimizer = tiny_train.optimizer.model_copy(update={"max_skipped_steps": 99})
    changed = tiny_train.model_copy(
        update={
            "log_every": 99,
            "checkpoint_every": 99,
            "keep_checkpoints": 9,
            "keep_best": "loss",
            "evaluate_every": 5,
            "activation_checkpointing": True,
            "compile": True,
            "parallel": ParallelConfig(kind="fsdp", micro_batches=4),
            "optimizer": optimizer,
        }
    )
    assert fixed_fields(changed, mixture) == fixed_fields(tiny_train, mixture)
    other = tiny_train.model_copy(update={"seed": 9})
    assert fixed_fields(other, mixture) != fixed_fields(tiny_train, mixture)
