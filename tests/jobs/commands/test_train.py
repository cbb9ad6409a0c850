"""What `coca train` makes of its options; the run itself is in tests/jobs/test_train.py."""

from typing import Any

import click
import pytest
from click.testing import CliRunner

from coca.errors import BadInput
from coca.train_config import TrainConfig
from coca.typed_config import resolve_config
from jobs.commands.train import WorkerRange, command, datasets, outcome, worker_settings
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig


def test_workers_are_a_number_or_a_range() -> None:
    assert WorkerRange().convert("4", None, None) == (None, 4)
    assert WorkerRange().convert("2:8", None, None) == (2, 8)
    for wrong in ("two", "2:", "2:8:9", ":8"):
        with pytest.raises(click.BadParameter, match="neither a number nor of the form MIN:MAX"):
            WorkerRange().convert(wrong, None, None)


def test_weights_and_versions_go_to_the_datasets_in_their_order() -> None:
    assert datasets(["a", "b"], [3.0, 1.0], []) == [{"uri": "a", "weight": 3.0}, {"uri": "b", "weight": 1.0}]
    assert datasets(["a"], [], [7]) == [{"uri": "a", "version": 7}]
    with pytest.raises(BadInput, match=r"--version is given 1 times, --data 2 times. Give one --version for each"):
        datasets(["a", "b"], [], [7])


def test_one_number_of_workers_ends_the_range_of_a_file() -> None:
    elastic = TrainRunConfig(
        data=(DataConfig(uri="a"),), out="run", train=TrainConfig(), workers=WorkersConfig(count=8, least=2)
    )
    assert resolve_config(elastic, None, worker_settings((None, 4))).workers == WorkersConfig(count=4)
    assert resolve_config(elastic, None, worker_settings((3, 6))).workers == WorkersConfig(count=6, least=3)
    assert resolve_config(elastic, None, worker_settings(None)).workers == elastic.workers


@pytest.mark.parametrize(("stopped", "exit_code"), [(None, 0), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_run_that_was_stopped_does_not_pass_for_one_that_is_done(stopped: str | None, exit_code: int) -> None:
    assert outcome({"stopped": stopped}) == ({"stopped": stopped}, exit_code)


@pytest.mark.parametrize(
    ("lost", "line"),
    [
        (None, "stopped at step 7; the same command goes on"),
        ("a node was lost", "stopped at step 7, without a checkpoint of the steps since: a node was lost; the same"),
    ],
)
def test_the_command_says_what_a_stop_has_kept(monkeypatch: pytest.MonkeyPatch, lost: str | None, line: str) -> None:
    def run_training(config: TrainRunConfig, **options: Any) -> dict[str, Any]:
        assert options["must_be_new"]
        stopped = {"stopped": "SIGTERM", "steps": 7, "final_loss": None, "lost": lost}
        return {**stopped, "report": None, "run": config.out}

    monkeypatch.setattr("jobs.train.run_training", run_training)
    done = CliRunner().invoke(command, ["--data", "a", "--out", "run", "--must-be-new", "--json"])
    assert done.exit_code == 143
    assert line in done.stdout
    assert '"steps": 7' in done.stdout.splitlines()[-1]
