"""The number of workers decides no number of a run but by the order of sums, also where it changes on the way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coca.dataset import Dataset
from coca.run_folder import RunFolder
from coca.train_config import TrainConfig
from tests.coca.rank_processes import run_phases

PHASES = [("to_the_end", size) for size in (1, 2, 3, 4)] + [("begin", 4), ("go_on", 2)]


def test_1_2_3_and_4_workers_and_a_change_from_4_to_2_see_and_learn_the_same(
    tmp_path: Path, make_dataset: Callable[..., Dataset], tiny_train: TrainConfig
) -> None:
    dataset = make_dataset(files=(24, 24))  # 12 row groups: one for each lane
    config = tiny_train.model_copy(update={"lanes": 12, "batch_size": 24, "steps": 8, "checkpoint_every": 8})
    run_phases("tests.coca.train_ranks", PHASES, config.model_dump_json(), dataset.store.uri, str(tmp_path / "runs"))
    runs: dict[str, list[dict[str, Any]]] = {
        name: RunFolder(tmp_path / "runs" / name).read_metrics() for name in ("1", "2", "3", "4", "changed")
    }
    for name, rows in runs.items():
        assert [row["step"] for row in rows] == list(range(1, 9)), name
        for one, row in zip(runs["1"], rows, strict=True):
            assert row["batch_digest"] == one["batch_digest"], (name, row["step"])
            for field in ("loss", "contrastive_loss", "captioning_loss", "grad_norm"):
                assert row[field] == pytest.approx(one[field], rel=1e-4), (name, row["step"], field)
    assert len({row["batch_digest"] for row in runs["1"]}) == 8
