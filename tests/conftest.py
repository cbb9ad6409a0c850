"""Shared by all tests: one local Ray and one S3 server for the session, both on loopback."""

import itertools
import socket
from collections.abc import Iterator

import pytest

from jobs.cluster import ClusterInfo, connect, disconnect

pytest_plugins = ["tests.dataset_fixtures"]


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Credentials for loopback services only, set before Ray starts so that its workers have them too."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        for name, value in {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{_free_port()}",
            "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        }.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def ray_cluster(environment: None) -> Iterator[ClusterInfo]:
    """A local Ray with four logical CPUs, shared by the whole session."""
    yield connect(num_cpus=4)
    disconnect()


@pytest.fixture(scope="session")
def s3_server(environment: None) -> Iterator[str]:
    """The endpoint of an S3 server (moto) that honours conditional writes."""
    import os

    from moto.server import ThreadedMotoServer

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(endpoint.rpartition(":")[2]), verbose=False)
    server.start()
    yield endpoint
    server.stop()


_bucket_numbers = itertools.count()


@pytest.fixture
def s3(s3_server: str) -> str:
    """The uri of an empty bucket of its own, ``s3://bucket-<n>``."""
    import boto3

    bucket = f"bucket-{next(_bucket_numbers)}"
    boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
