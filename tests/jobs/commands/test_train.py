"""What `coca train` makes of its options; the run itself is in tests/jobs/test_train.py."""

import click
import pytest

from coca.errors import BadInput
from jobs.commands.train import WorkerRange, datasets


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
