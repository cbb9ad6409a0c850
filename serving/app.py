"""The Ray Serve application: an HTTP ingress before batching model replicas; its start and its end."""

import asyncio
import errno
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from coca.checkpoint import load_checkpoint
from coca.errors import BadInput, RunFailed
from coca.images import ImageLimits
from serving.api import create_api
from serving.api_errors import unavailable
from serving.config import ServeConfig
from serving.engine import Engine, model_info
from serving.results import Caption, Embedding, ModelInfo, Refusal

APPLICATION = "coca"
Result = TypeVar("Result")

GATEWAY_CPUS = 0.1
SPARE_REQUESTS = 64  # for health checks, docs and refusals while admission is full
SERVE_CONTROLLER_NAME, SERVE_NAMESPACE = "SERVE_CONTROLLER_ACTOR", "serve"


class Model:
    """A replica: decodes in a few threads, computes in one, so that its event loop always answers.

    Inputs are prepared before they may join a batch: a bad one never reaches its neighbours.
    """

    def __init__(self, config: ServeConfig) -> None:
        self._engine = create_engine(config)
        self._decoding = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="decode")
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="compute")
        batched: Any
        for batched in (self._caption_batch, self._image_batch, self._text_batch):
            batched.set_max_batch_size(config.max_batch_size)
            batched.set_batch_wait_timeout_s(config.batch_wait_ms / 1000)

    async def caption(self, images: list[bytes]) -> list[Caption | Refusal]:
        return await asyncio.gather(*(self._caption(image) for image in images))

    async def embed(self, inputs: list[str | bytes]) -> list[Embedding | Refusal]:
        return await asyncio.gather(
            *(self._embed_text(item) if isinstance(item, str) else self._embed_image(item) for item in inputs)
        )

    async def check(self) -> None:
        """A forward pass, behind the batches already waiting for the compute thread."""
        await self._run(self._computing, self._engine.check)

    async def check_health(self) -> None:
        """Serve calls this, and replaces a replica that raises or does not answer in time."""
        await self.check()

    async def _caption(self, image: bytes) -> Caption | Refusal:
        pixels = await self._run(self._decoding, self._engine.pixels, image)
        return pixels if isinstance(pixels, Refusal) else await self._caption_batch(pixels)

    async def _embed_image(self, image: bytes) -> Embedding | Refusal:
        pixels = await self._run(self._decoding, self._engine.pixels, image)
        return pixels if isinstance(pixels, Refusal) else await self._image_batch(pixels)

    async def _embed_text(self, text: str) -> Embedding | Refusal:
        tokens = self._engine.tokens(text)
        return tokens if isinstance(tokens, Refusal) else await self._text_batch(tokens)

    @serve.batch
    async def _caption_batch(self, pixels: list[np.ndarray]) -> list[Caption]:
        return await self._run(self._computing, self._engine.caption_pixels, pixels)

    @serve.batch
    async def _image_batch(self, pixels: list[np.ndarray]) -> list[Embedding]:
        return await self._run(self._computing, self._engine.embed_pixels, pixels)

    @serve.batch
    async def _text_batch(self, tokens: list[list[int]]) -> list[Embedding]:
        return await self._run(self._computing, self._engine.embed_tokens, tokens)

    async def _run(self, threads: ThreadPoolExecutor, function: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


class ReplicaClient:
    """The model's replicas as a `serving.api.ModelClient`."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def caption(self, images: list[bytes]) -> list[Caption | Refusal]:
        return await self._call("caption", images)

    async def embed(self, inputs: list[str | bytes]) -> list[Embedding | Refusal]:
        return await self._call("embed", inputs)

    async def check(self) -> None:
        try:
            await self._call("check")
        except RayTaskError as error:
            raise unavailable("the model failed its health check") from error

    async def _call(self, method: str, *arguments: Any) -> Any:
        response = getattr(self._handle, method).remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:  # the caller has gone, or its time is up
            response.cancel()
            raise
        except (DeploymentUnavailableError, ReplicaUnavailableError, RayActorError) as error:
            raise unavailable(f"no replica of the model answers ({type(error).__name__})") from error


class Gateway:
    """The ingress replica: HTTP in front of the model's handle."""

    def __init__(self, config: ServeConfig, info: ModelInfo, model: DeploymentHandle) -> None:
        self._config, self._info, self._model = config, info, model

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_api(self._config, self._info, ReplicaClient(self._model))


@dataclass(frozen=True)
class Service:
    """A running service."""

    url: str
    info: ModelInfo


def create_engine(config: ServeConfig) -> Engine:
    """The engine of a replica with this config.

    Raises:
        BadInput: the checkpoint is missing or broken.
    """
    return Engine(
        config.checkpoint,
        device="cuda" if config.gpus_per_replica else "cpu",
        limits=ImageLimits(max_bytes=config.max_image_bytes, max_pixels=config.max_pixels),
        max_caption_tokens=config.max_caption_tokens,
    )


@dataclass(frozen=True)
class Plan:
    """A config that can be deployed: one checkpoint, verified, and a port that was free."""

    config: ServeConfig
    info: ModelInfo


def prepare(config: ServeConfig) -> Plan:
    """Everything that can be refused without a cluster; port 0 becomes a free one.

    Raises:
        BadInput: the checkpoint is missing or broken, or the port is taken.
    """
    port = _free_port(config.host, config.port)
    checkpoint = load_checkpoint(config.checkpoint)
    # A run's newest checkpoint is chosen once, so that no two replicas differ.
    pinned = config.model_copy(update={"checkpoint": checkpoint.uri, "port": port})
    return Plan(pinned, model_info(checkpoint))


def refuse_too_large(config: ServeConfig, cpus: float, gpus: float) -> None:
    """Hold the config against a cluster that will not grow; Serve would wait for ever.

    Raises:
        BadInput: the replicas need more than there is.
    """
    needs = {
        "CPUs": (config.replicas * config.cpus_per_replica + GATEWAY_CPUS, cpus, "cpus_per_replica"),
        "GPUs": (config.replicas * config.gpus_per_replica, gpus, "gpus_per_replica"),
    }
    for kind, (needed, there, field) in needs.items():
        if needed > there:
            raise BadInput(
                f"{config.replicas} replicas need {needed:g} {kind}, and there are {there:g}",
                f"Lower replicas or {field}, or join a larger cluster with RAY_ADDRESS",
            )


def build_application(plan: Plan) -> serve.Application:
    """The application, ready for `serve.run`."""
    config = plan.config
    # One batch computing and one filling; the rest waits in the gateway's handle (docs/serving.md).
    model = serve.deployment(
        name="Model",
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica},
        max_ongoing_requests=2 * config.max_batch_size,
        health_check_timeout_s=config.health_timeout_s,
        max_constructor_retry_count=1,
    )(Model)
    # Every request holds at least one input, so admission refuses before these limits do.
    gateway = serve.deployment(
        name="Gateway",
        ray_actor_options={"num_cpus": GATEWAY_CPUS},
        max_ongoing_requests=config.max_pending_inputs + SPARE_REQUESTS,
        max_queued_requests=SPARE_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
    )(serve.ingress()(Gateway))
    return gateway.bind(config, plan.info, model.bind(config))


def start(plan: Plan) -> Service:
    """Start Serve on the connected cluster and wait until the application is up.

    Raises:
        BadInput: Serve already runs on this cluster.
        RunFailed: the replicas do not start.
    """
    _refuse_running_serve()
    config = plan.config
    logging = LoggingConfig(log_level="WARNING", enable_access_log=False)
    # The gateway times requests itself, with an answer in the API's form; this is the wall behind it.
    timeout_s = config.request_timeout_s + 30
    serve.start(
        http_options={"host": config.host, "port": config.port, "request_timeout_s": timeout_s},
        logging_config=logging,
    )
    try:
        serve.run(build_application(plan), name=APPLICATION, logging_config=logging)
    except BaseException as error:  # also Ctrl-C: nothing half started is left behind
        shutdown()
        if isinstance(error, (RuntimeError, TimeoutError)):
            raise RunFailed(f"the service did not start: {error}") from error
        raise
    return Service(f"http://{_host_of_url(config.host)}:{config.port}", plan.info)


def deploy(config: ServeConfig) -> Service:
    """`prepare` and `start`, on the connected cluster."""
    return start(prepare(config))


def require_running() -> None:
    """Raise where the service has gone: deleted from outside, or its replicas fail for good.

    Raises:
        RunFailed: with the application's state.
    """
    application = serve.status().applications.get(APPLICATION)
    state = "gone" if application is None else application.status.value
    if state in ("gone", "DELETING", "DEPLOY_FAILED"):
        message = f": {application.message}" if application else ""
        raise RunFailed(f"the service is {state}{message}")


def shutdown() -> None:
    """Stop the service and Serve itself; requests in flight are answered first."""
    serve.shutdown()


def _refuse_running_serve() -> None:
    actors = ray.util.list_named_actors(all_namespaces=True)
    if any(actor["name"] == SERVE_CONTROLLER_NAME and actor["namespace"] == SERVE_NAMESPACE for actor in actors):
        raise BadInput(
            "Ray Serve already runs on this cluster, and a cluster has one",
            "Stop it there with `serve shutdown`, or use another cluster",
        )


def _free_port(host: str, port: int) -> int:
    """``port``, or a free one for 0. Serve listens with SO_REUSEPORT: it would not notice another Serve."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise BadInput(
                    f"port {port} on {host} is taken", "Stop its server or give --port, 0 for a free one"
                ) from None
            raise BadInput(
                f"cannot listen on {host}:{port}: {error.strerror}", "Give another --host or --port"
            ) from None
        return int(listener.getsockname()[1])


def _host_of_url(host: str) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104 - the caller's choice, told as an address that can be called
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
