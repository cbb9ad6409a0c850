"""Patience with S3: what is tried again, how often, and what is said in the end."""

import pickle
import re
from collections.abc import Callable

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from coca.errors import BadInput, RunFailed
from coca.s3 import StoreFailed, delta_options, max_attempts, retry


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr("coca.s3.time.sleep", slept.append)
    return slept


def refusal(status: int) -> ClientError:
    return ClientError({"Error": {"Code": "X"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def failing(*errors: Exception) -> tuple[Callable[[], str], list[Exception]]:
    """An action that raises these, then succeeds; and what is left of them."""
    left = list(errors)

    def action() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return action, left


def test_what_passes_is_tried_again(pauses: list[float]) -> None:
    errors = OSError("cut"), refusal(503), EndpointConnectionError(endpoint_url="http://x"), KeyError("also")
    action, left = failing(*errors)
    assert retry("s3://b/d", action, KeyError) == "done"
    assert (left, len(pauses)) == ([], 4)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (FileNotFoundError("gone"), FileNotFoundError),
        (PermissionError("no"), PermissionError),
        (RunFailed("the lease was taken over"), RunFailed),
        (BadInput("a", "b"), BadInput),
        (refusal(403), OSError),
        (OSError("AWS Error ACCESS_DENIED"), OSError),
        (OSError("AWS Error NO_SUCH_BUCKET during PutObject"), OSError),
        (NoCredentialsError(), OSError),
        (KeyError("ours"), KeyError),
    ],
)
def test_what_lasts_is_not(pauses: list[float], error: Exception, raised: type[Exception]) -> None:
    action, _ = failing(error)
    with pytest.raises(raised) as caught:
        retry("s3://b/d", action)
    assert not isinstance(caught.value, StoreFailed)
    assert pauses == []


def test_in_the_end_one_line_says_so(pauses: list[float]) -> None:
    action, left = failing(*[OSError("Kernel error\n \x1b[31m\u21b3\x1b[0m Generic S3 error" + "." * 1000)] * 10)
    with pytest.raises(
        StoreFailed, match=re.escape("s3://b/d does not answer as it should: Kernel error Generic")
    ) as e:
        retry("s3://b/d", action)
    assert (left, len(pauses)) == ([], 9)
    assert len(str(e.value)) < 600
    assert isinstance(e.value, OSError)
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)


def test_attempts_are_those_of_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_MAX_ATTEMPTS", raising=False)
    assert max_attempts() == 10
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    assert (max_attempts(), delta_options()["max_retries"]) == (3, "2")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "many")
    with pytest.raises(BadInput, match="AWS_MAX_ATTEMPTS=many is no number"):
        max_attempts()
