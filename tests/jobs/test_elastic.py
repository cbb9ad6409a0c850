"""How many workers, and what comes after each attempt: the driver's loop against attempts and clusters of our own."""

import time
from collections.abc import Iterator
from typing import Any

import pytest

from coca.errors import BadInput, RunFailed
from coca.train_config import ParallelConfig, TrainConfig
from jobs import control_plane, elastic
from jobs.attempt import NoRoom, WorkersLost
from jobs.config import DataConfig, TrainRunConfig, WorkersConfig
from jobs.elastic import Driver, Failures, world_sizes
from jobs.stop_signal import Interrupts

STEPS = 100


def train_config(**changes: Any) -> TrainConfig:
    return TrainConfig(steps=STEPS, batch_size=24, lanes=12, **changes)


def test_world_sizes_are_the_divisors_of_the_lanes_in_the_range() -> None:
    assert world_sizes(WorkersConfig(least=2, count=8), train_config()) == [2, 3, 4, 6]
    assert world_sizes(WorkersConfig(count=4), train_config()) == [4]
    hybrid = train_config(parallel=ParallelConfig(kind="fsdp", shard_workers=2))
    assert world_sizes(WorkersConfig(least=1, count=12), hybrid) == [2, 4, 6, 12]


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        ({"count": 5}, r"5 workers do not divide lanes = 12. Use 1, 2, 3, 4, 6 or 12 workers"),
        ({"count": 2, "least": 3}, r"workers.least = 3 is above workers.count = 2. Give --workers 2:3"),
        ({"count": 11, "least": 7}, r"no number of workers from 7 to 11 .* one of 1, 2, 3, 4, 6, 12"),
    ],
)
def test_numbers_that_cannot_be_are_refused_with_those_that_can(workers: dict[str, int], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        world_sizes(WorkersConfig.model_validate(workers), train_config())
    hybrid = train_config(parallel=ParallelConfig(kind="fsdp", shard_workers=5))
    with pytest.raises(BadInput, match=r"shard_workers = 5 divides none of .*\[2, 3, 4, 6\]"):
        world_sizes(WorkersConfig(least=2, count=8), hybrid)


class FakeSignal:
    def __init__(self, nodes: list[str]) -> None:
        self.nodes, self.is_asked, self.looks = nodes, False, 0
        self.away = 0  # calls that fail before the control plane answers

    def ask(self) -> None:
        self._answer()
        self.is_asked = True

    def workers(self) -> dict[int, tuple[str, int]]:
        self.looks += 1
        self._answer()
        return {rank: (node, 0) for rank, node in enumerate(self.nodes)}

    def _answer(self) -> None:
        self.away -= 1
        if self.away >= 0:
            raise ConnectionError("no control plane")


class FakeAttempt:
    """Ends with ``outcome``; with a number, at that step once it is asked to stop."""

    def __init__(self, size: int, outcome: Any, nodes: list[str] | None = None) -> None:
        self.world_size, self._outcome = size, outcome
        self.stop_signal = FakeSignal(["a"] * size if nodes is None else nodes)

    def join(self, timeout_s: float) -> bool:
        return not isinstance(self._outcome, int) or self.stop_signal.is_asked

    def result(self) -> dict[str, Any]:
        if isinstance(self._outcome, BaseException):
            raise self._outcome
        return {"steps": self._outcome if isinstance(self._outcome, int) else STEPS, "final_loss": 1.0}


class Rig:
    """A driver whose attempts have the given outcomes."""

    def __init__(self, outcomes: list[Any], **workers: Any) -> None:
        self.sizes: list[int] = []
        self.interrupts = Interrupts()
        self.checkpoints: Iterator[int] = iter(range(10, 10_000, 10))
        self._outcomes = iter(outcomes)
        config = TrainRunConfig(
            data=(DataConfig(uri="unused"),),
            out="unused",
            train=train_config(),
            workers=WorkersConfig.model_validate(workers),
        )
        self.taken_over: Exception | None = None
        self.driver = Driver(
            config,
            self._start,  # type: ignore[arg-type]
            lambda: next(self.checkpoints),
            self.interrupts,
            self._held,
        )

    def _held(self) -> None:
        if self.taken_over is not None:
            raise self.taken_over

    def _start(self, size: int) -> FakeAttempt:
        self.sizes.append(size)
        outcome = next(self._outcomes)
        return outcome(size) if callable(outcome) else FakeAttempt(size, outcome)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("POLL_S", "DRAIN_CHECK_S", "GROWTH_CHECK_S", "SETTLE_S"):
        monkeypatch.setattr(elastic, name, 0.001)
    monkeypatch.setattr(elastic, "draining_nodes", lambda: set())
    monkeypatch.setattr(control_plane, "_request", lambda bundles: None)


def rig(monkeypatch: pytest.MonkeyPatch, outcomes: list[Any], rooms: list[int], **workers: Any) -> Rig:
    """On a cluster whose room is each of ``rooms`` in turn, then the last."""
    left = list(rooms)

    def room(wanted: Any = None, ours: Any = None) -> int:
        return left.pop(0) if len(left) > 1 else left[0]

    monkeypatch.setattr(elastic, "cluster_room", room)
    return Rig(outcomes, **workers)


DONE = "done"
DIED = WorkersLost("a worker died", died=True)


def test_a_lost_node_makes_a_run_smaller(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    driven = rig(monkeypatch, [DIED, DONE], [9, 3], least=2, count=8)
    result = driven.driver.run()
    assert driven.sizes == [6, 3]
    assert (result["steps"], result["workers"], result["stopped"]) == (STEPS, 3, None)
    said = capsys.readouterr().err
    assert "train: a worker died; going on from step 10" in said
    assert "train: 3 workers from here on, 6 before" in said


def test_room_makes_a_run_larger_after_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driven = rig(monkeypatch, [30, DONE], [2, 2, 2, 5], least=2, count=8)
    assert driven.driver.run()["workers"] == 4
    assert driven.sizes == [2, 4]
    assert "room for 5 workers: a checkpoint, then on with more" in capsys.readouterr().err


def test_a_growth_waits_until_ray_has_freed_what_the_old_workers_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elastic, "SETTLE_S", 60.0)
    driven = rig(monkeypatch, [30, DONE], [2, 5, 2, 2, 4], least=2, count=8)
    driven.driver.run()
    assert driven.sizes == [2, 4]


def test_after_a_growth_that_did_not_succeed_the_next_one_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    left = [2, 5]  # the others were quicker, each time

    def room(wanted: Any = None, ours: Any = None) -> int:
        return left.pop(0) if left else 2 if ours is None else 5

    monkeypatch.setattr(elastic, "cluster_room", room)
    driven = Rig([30, 40, 50, DONE], least=2, count=8)
    driven.driver.run()
    assert driven.sizes == [2, 2, 2, 2]
    assert driven.driver._growth_check_s == pytest.approx(0.004)  # a growth is known to have failed at the next look


def test_an_autoscaler_is_asked_for_the_largest_size_while_an_elastic_run_lives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr(control_plane, "_request", asked.append)
    rig(monkeypatch, [DONE], [2], least=2, count=5, cpus=0.5).driver.run()
    assert asked == [[{"CPU": 0.5}] * 4, []]
    with pytest.raises(RunFailed):
        rig(monkeypatch, [RunFailed("the disk is full")], [2], least=2, count=5).driver.run()
    assert asked[2:] == [[{"CPU": 1.0}] * 4, []]
    rig(monkeypatch, [DONE], [0], count=4).driver.run()
    assert len(asked) == 4  # the workers of a fixed run are asked for by Ray itself


def test_a_control_plane_that_is_away_for_a_while_ends_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers: list[Any] = [OSError("away"), 2, RuntimeError("away"), 5]

    def room(wanted: Any = None, ours: Any = None) -> int:
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return int(answer)

    drains: list[Any] = [ConnectionError("away"), set()]

    def draining() -> set[str]:
        answer = drains.pop(0) if len(drains) > 1 else drains[0]
        if isinstance(answer, Exception):
            raise answer
        return set(answer)

    monkeypatch.setattr(elastic, "cluster_room", room)
    monkeypatch.setattr(elastic, "draining_nodes", draining)

    def begun(size: int) -> FakeAttempt:
        attempt = FakeAttempt(size, 30)
        attempt.stop_signal.away = 2
        return attempt

    driven = Rig([begun, DONE], least=2, count=8)
    assert driven.driver.run()["workers"] == 4
    assert driven.sizes == [2, 4]
    assert capsys.readouterr().err.count("control plane did not answer, asking again: OSError: away") == 1


def test_once_all_workers_have_begun_they_are_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = rig(monkeypatch, [], [2], least=2, count=8)
    polls, looks = iter(range(50)), []

    def begun(size: int) -> FakeAttempt:
        attempt = FakeAttempt(size, 100)

        def join(timeout_s: float) -> bool:
            time.sleep(0.001)
            return next(polls, None) is None

        attempt.join = join  # type: ignore[method-assign]
        looks.append(attempt.stop_signal)
        return attempt

    driven._outcomes = iter([begun])
    driven.driver.run()
    assert looks[0].looks == 1


def test_a_stop_that_the_control_plane_did_not_take_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = rig(monkeypatch, [], [1], count=1)

    def begun(size: int) -> FakeAttempt:
        driven.interrupts.name = "SIGTERM"
        attempt = FakeAttempt(size, 42)
        attempt.stop_signal.away = 3
        return attempt

    driven._outcomes = iter([begun])
    assert driven.driver.run()["steps"] == 42


def test_a_death_before_the_checkpoint_of_a_stop_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driven = rig(monkeypatch, [], [1], count=1)

    def begun(size: int) -> FakeAttempt:
        driven.interrupts.name = "SIGTERM"
        return FakeAttempt(size, DIED)

    driven._outcomes = iter([begun])
    result = driven.driver.run()
    assert (result["steps"], result["stopped"], result["lost"]) == (10, "SIGTERM", "a worker died")
    assert "train: a worker died, before the checkpoint of the stop" in capsys.readouterr().err


def test_a_run_that_was_taken_over_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    driven, attempts = rig(monkeypatch, [], [1], count=1), []

    def begun(size: int) -> FakeAttempt:
        driven.taken_over = RunFailed("taken over")
        attempts.append(FakeAttempt(size, 42))
        return attempts[0]

    driven._outcomes = iter([begun])
    with pytest.raises(RunFailed, match="taken over"):
        driven.driver.run()
    assert attempts[0].stop_signal.is_asked


def test_a_fixed_run_looks_at_no_room_and_keeps_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = rig(monkeypatch, [DIED, NoRoom("no"), DONE], [0], count=4)
    assert driven.driver.run()["workers"] == 4
    assert driven.sizes == [4, 4, 4]


def test_a_drained_node_is_left_after_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(elastic, "draining_nodes", lambda: {"b", "elsewhere"})
    driven = rig(monkeypatch, [lambda size: FakeAttempt(size, 7, ["a", "a", "b", "b"]), DONE], [4, 2], least=2, count=4)
    assert driven.driver.run()["workers"] == 2
    assert driven.sizes == [4, 2]
    assert "node b is being drained" in capsys.readouterr().err


def test_a_stop_ends_the_run_with_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = rig(monkeypatch, [42], [1], count=1)
    driven.interrupts.name = None

    def begun(size: int) -> FakeAttempt:
        driven.interrupts.name = "SIGTERM"
        return FakeAttempt(size, 42)

    driven._outcomes = iter([begun])
    result = driven.driver.run()
    assert (result["steps"], result["stopped"]) == (42, "SIGTERM")


def test_a_stop_before_the_workers_have_begun_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    driven = rig(monkeypatch, [], [1], count=1)

    def begun(size: int) -> FakeAttempt:
        driven.interrupts.name = "SIGINT"
        attempt = FakeAttempt(size, 42, nodes=[])
        attempt.join = lambda timeout_s: False  # type: ignore[method-assign]
        return attempt

    driven._outcomes = iter([begun])
    result = driven.driver.run()
    assert (result["steps"], result["stopped"]) == (10, "SIGINT")


def test_without_room_it_waits_and_then_gives_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    driven = rig(monkeypatch, [DONE], [0, 1, 1, 1, 2], least=2, count=8)
    assert driven.driver.run()["workers"] == 2
    assert capsys.readouterr().err.count("no room for 2 workers: waiting") == 1
    monkeypatch.setattr(elastic, "ROOM_TIMEOUT_S", 0.01)
    with pytest.raises(RunFailed, match=r"no room for 2 workers of {'CPU': 1.0}"):
        rig(monkeypatch, [], [1], least=2, count=8).driver.run()


@pytest.mark.parametrize("error", [BadInput("a field differs", "Give the old"), RunFailed("the disk is full")])
def test_what_a_worker_says_in_our_words_ends_the_run_at_once(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    driven = rig(monkeypatch, [error], [1], count=1)
    with pytest.raises(type(error)) as raised:
        driven.driver.run()
    assert raised.value is error
    assert driven.sizes == [1]


def test_deaths_in_a_row_are_counted_and_a_checkpoint_makes_up_for_them() -> None:
    failures = Failures(most=2)
    for step in (5, 5, 6, 6):
        failures.count(DIED, step)
    with pytest.raises(RunFailed, match="a worker died; 3 times in a row without a new checkpoint") as raised:
        failures.count(DIED, 6)
    assert raised.value.repeat_helps


def test_an_error_that_comes_again_at_once_is_one_in_the_code() -> None:
    failures = Failures(most=10)
    failures.count(WorkersLost("TypeError: no", died=False), None)
    failures.count(WorkersLost("KeyError: 'x'", died=False), None)
    with pytest.raises(RunFailed, match="KeyError: 'x'; 3 times in a row") as raised:
        failures.count(WorkersLost("KeyError: 'x'", died=False), None)
    assert not raised.value.repeat_helps
