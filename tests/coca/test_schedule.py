"""Schedules at points computed by hand."""

import itertools

import pytest

from coca.schedule import schedule
from coca.train_config import OptimizerConfig


def test_linear() -> None:
    config = OptimizerConfig(warmup_fraction=0.1)
    values = [schedule(step, 100, config) for step in (0, 4, 9, 10, 55, 100)]
    assert values == pytest.approx([1 / 11, 5 / 11, 10 / 11, 1, 0.5, 0])


def test_cosine() -> None:
    config = OptimizerConfig(warmup_fraction=0, schedule="cosine")
    assert [schedule(step, 90, config) for step in (0, 30, 45, 90)] == pytest.approx([1, 0.75, 0.5, 0])


def test_warmup_stable_decay() -> None:
    config = OptimizerConfig(warmup_fraction=0.1, schedule="warmup_stable_decay", decay_fraction=0.2)
    values = [schedule(step, 100, config) for step in (0, 9, 10, 50, 80, 85, 99, 100)]
    assert values == pytest.approx([1 / 11, 10 / 11, 1, 1, 1, 0.75, 0.05, 0])


def test_a_decay_longer_than_what_the_warmup_leaves_is_linear() -> None:
    stable = OptimizerConfig(warmup_fraction=0.5, schedule="warmup_stable_decay", decay_fraction=0.9)
    linear = OptimizerConfig(warmup_fraction=0.5)
    assert [schedule(step, 20, stable) for step in range(21)] == [schedule(step, 20, linear) for step in range(21)]


def test_without_a_decay_the_peak_stays_to_the_end() -> None:
    config = OptimizerConfig(warmup_fraction=0, schedule="warmup_stable_decay", decay_fraction=0)
    assert {schedule(step, 10, config) for step in range(11)} == {1.0}


@pytest.mark.parametrize("shape", ["linear", "cosine", "warmup_stable_decay"])
def test_every_schedule_falls_without_a_jump_after_the_warmup(shape: str) -> None:
    config = OptimizerConfig.model_validate({"schedule": shape, "warmup_fraction": 0.05})
    values = [schedule(step, 1000, config) for step in range(1001)]
    changes = [after - before for before, after in itertools.pairwise(values)]
    assert all(abs(change) < 0.021 for change in changes)
    assert all(change <= 0 for change in changes[50:])
    assert values[1000] == pytest.approx(0)
