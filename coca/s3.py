"""The clients of S3, patient with a store that answers 503, late, cut short or not at all.

Each client tries its requests again by itself, ``AWS_MAX_ATTEMPTS`` times (10 where that is not set). What none of them
notices or takes on - an answer that ends early, or the loss of the answer to what was done - :func:`retry` does, as
often.
"""

import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow.fs as pafs

from coca.errors import BadInput, RunFailed

_ATTEMPTS = 10
_LONGEST_PAUSE = 5
_CONNECT_TIMEOUT_S = 10
# Without a byte for so long, an answer is not waited for any more.
_READ_TIMEOUT_S = 60
_CONNECTIONS = 32
# As pyarrow names what asking again does not change.
_LASTING = ("ACCESS_DENIED", "NO_SUCH_BUCKET")

Result = TypeVar("Result")


class StoreFailed(RunFailed, OSError):
    """A store that has not answered, or not rightly, as often as it was asked."""


class CutShort(OSError):
    """An answer that lacks its end."""


def endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None


def region() -> str:
    return os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"


def max_attempts() -> int:
    """Of one request, the first included."""
    text = os.environ.get("AWS_MAX_ATTEMPTS") or str(_ATTEMPTS)
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"AWS_MAX_ATTEMPTS={text} is no number of attempts", "Give a whole number from 1")
    return int(text)


def s3_filesystem() -> pafs.S3FileSystem:
    options: dict[str, Any] = {
        "region": region(),
        "allow_bucket_creation": False,
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=max_attempts()),
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "request_timeout": _READ_TIMEOUT_S,
    }
    address = endpoint()
    if address:
        options["scheme"], options["endpoint_override"] = address.split("://")
    return pafs.S3FileSystem(**options)


def s3_client() -> Any:
    """A boto3 client; one serves many threads."""
    try:
        import boto3
        from botocore.config import Config
    except ImportError:
        raise _no_boto3() from None
    config = Config(
        retries={"mode": "standard", "total_max_attempts": max_attempts()},
        connect_timeout=_CONNECT_TIMEOUT_S,
        read_timeout=_READ_TIMEOUT_S,
        max_pool_connections=_CONNECTIONS,
    )
    return boto3.client("s3", endpoint_url=endpoint(), region_name=region(), config=config)


def delta_options() -> dict[str, str]:
    """``storage_options`` for deltalake; commits go by conditional PUT."""
    options = {
        "AWS_REGION": region(),
        "aws_conditional_put": "etag",
        "max_retries": str(max_attempts() - 1),
        "connect_timeout": f"{_CONNECT_TIMEOUT_S}s",
        "timeout": f"{_READ_TIMEOUT_S}s",
    }
    address = endpoint()
    if address:
        options["AWS_ENDPOINT_URL"] = address
        if address.startswith("http://"):
            options["AWS_ALLOW_HTTP"] = "true"
    return options


def retry(uri: str, action: Callable[[], Result], *also: type[Exception]) -> Result:
    """The result of an action that may be done twice, tried again where S3 has failed it.

    Args:
        uri: of the store, for the message.
        also: errors to take for failures of S3, besides ``OSError`` and those of boto3.

    Raises:
        StoreFailed: it failed time and again.
        OSError: there is no such file or bucket, or no right to it; it is not asked again.
    """
    try:
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
    except ImportError:
        raise _no_boto3() from None
    attempts = max_attempts()
    for attempt in range(1, attempts + 1):
        try:
            return action()
        except (FileNotFoundError, PermissionError, RunFailed, BadInput):
            raise
        except ClientError as error:
            problem, lasts = _one_line(error), status_of(error) < 500
        except (OSError, BotoCoreError, *also) as error:
            problem = _one_line(error)
            lasts = isinstance(error, NoCredentialsError) or any(name in problem for name in _LASTING)
        if lasts or attempt == attempts:
            break
        time.sleep(random.uniform(0.1, 0.5) * min(attempt, _LONGEST_PAUSE))
    if lasts:
        raise OSError(f"{uri}: {problem}")
    raise StoreFailed(f"{uri} does not answer as it should: {problem}; run the same command again once it does")


def status_of(error: Exception) -> int:
    """The HTTP status of a ``ClientError``; 0 where it has none."""
    response: dict[str, Any] = getattr(error, "response", {})
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _one_line(error: Exception, limit: int = 400) -> str:
    """Without the colours and the tree that deltalake draws."""
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m|\u21b3", "", str(error)).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def _no_boto3() -> BadInput:
    return BadInput("reading and writing s3:// needs boto3", "pip install 'coca[s3]'")
