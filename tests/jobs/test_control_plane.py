"""What a driver asks of Ray, where Ray does not answer."""

import pytest

from jobs import control_plane
from jobs.control_plane import ControlPlane, asking_autoscaler


def fail() -> int:
    raise ConnectionError("no control plane")


def test_a_call_that_fails_gives_none_and_is_told_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ControlPlane()
    assert [asked.ask(lambda: 3), asked.ask(fail), asked.ask(fail)] == [3, None, None]
    assert capsys.readouterr().err.count("did not answer, asking again: ConnectionError: no control plane") == 1
    monkeypatch.setattr(control_plane, "_SAY_EVERY_S", 0.0)
    assert asked.ask(fail) is None
    assert "asking again" in capsys.readouterr().err


def test_the_request_to_an_autoscaler_is_released_and_may_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, float]]] = []
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: asked.append(bundles))
    with pytest.raises(KeyError), asking_autoscaler({"CPU": 2.0, "GPU": 1.0}, 3):
        assert asked == [[{"CPU": 2.0, "GPU": 1.0}] * 3]
        raise KeyError
    assert asked[1:] == [[]]
    monkeypatch.setattr("ray.autoscaler.sdk.request_resources", lambda bundles: fail())
    with asking_autoscaler({"CPU": 2.0}, 3):
        pass
