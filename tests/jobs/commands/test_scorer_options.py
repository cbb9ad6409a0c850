"""The options of scorers, and what a machine alone cannot carry."""

from types import SimpleNamespace

import pytest

from coca.errors import BadInput
from jobs.commands.scorer_options import connect_for, scorer_specs


@pytest.mark.parametrize(
    ("scorers", "gpus", "started_here", "refused"),
    [
        (("a:b",), 1.0, True, True),
        (("a:b",), 1.0, False, False),  # another cluster may add nodes
        (("a:b",), 0.0, True, False),
        ((), 1.0, True, False),
    ],
)
def test_gpus_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, scorers: tuple[str, ...], gpus: float, started_here: bool, refused: bool
) -> None:
    joined = SimpleNamespace(started_here=started_here, gpus=0.0)
    monkeypatch.setattr("jobs.cluster.connect", lambda: joined)
    connect = connect_for(scorers, 2, gpus)
    if refused:
        with pytest.raises(BadInput, match="2 scorers with 1 GPUs each: this machine has 0"):
            connect()
    else:
        assert connect() is joined


def test_specs_carry_their_resources() -> None:
    [spec] = scorer_specs(("jobs.scorers:CheckpointScorer",), 3, 0.5)
    assert (spec.actors, spec.num_gpus) == (3, 0.5)
    assert scorer_specs((), 3, 0.5) == []
